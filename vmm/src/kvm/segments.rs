//! Segments that cover all memory, as 64-bit kernels and their programs have them.
//!
//! Owns: what is the same in all of them, and the task state segment beside them. They are present, accessed already (so
//! that loading one writes nothing), code readable, data writable (Intel SDM volume 3, 3.4.5 and 8.2.3).

use kvm_bindings::kvm_segment;

/// The first entries of a global descriptor table with the segments of both rings: none, code and data of ring 0, data and
/// code of ring 3.
pub const GDT_BOTH_RINGS: [u64; 5] =
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];

/// The two entries behind them for a busy task state segment at `base`, which is below 16 MiB.
pub const fn tss_descriptor(base: u32, limit: u16) -> [u64; 2] {
    [0x8b << 40 | (base as u64 & 0xff_ffff) << 16 | limit as u64, 0]
}

/// The task state segment that [`tss_descriptor`] describes, as it is when `selector` has been loaded.
pub fn tss(selector: u16, base: u32, limit: u16) -> kvm_segment {
    kvm_segment {
        base: base.into(),
        limit: limit.into(),
        selector,
        type_: 11,
        present: 1,
        ..Default::default()
    }
}

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
