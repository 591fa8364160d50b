//! Segments that cover all memory, as 64-bit kernels and their programs have them.
//!
//! Owns: what is the same in all of them. They are present, accessed already (so that loading one writes nothing), code
//! readable, data writable (Intel SDM volume 3, 3.4.5).

use kvm_bindings::kvm_segment;

/// 64-bit code of ring `dpl`.
pub fn code_64(selector: u16, dpl: u8) -> kvm_segment {
    kvm_segment { type_: 11, l: 1, db: 0, ..data(selector, dpl) }
}

/// 32-bit code of ring `dpl`, in compatibility mode.
pub fn code_32(selector: u16, dpl: u8) -> kvm_segment {
    kvm_segment { type_: 11, ..data(selector, dpl) }
}

/// Data of ring `dpl`, or its stack.
pub fn data(selector: u16, dpl: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: 3,
        present: 1,
        dpl,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    }
}
