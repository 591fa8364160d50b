//! The names of what small guests do, for the program and for the tests that run it.

/// Each in ring 0 and in ring 3.
pub const BEHAVIOURS: [&str; 17] = [
    "loop",
    "store",
    "rep-movs",
    "strings",
    "sti",
    "self-modifying",
    "fpu-sse",
    "exception",
    "page-fault",
    "system-call",
    "flags",
    "flags-fault",
    "trap-flag",
    "interrupt",
    "sysret",
    "string-rewritten",
    "sti-look-alike",
];
