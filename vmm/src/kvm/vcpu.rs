//! The vCPU: enter the guest, leave with an [`Exit`] as plain data.
//!
//! Owns: the vCPU handle and its `kvm_run` page. Must never: decide what an exit means.
//! Called on the vCPU thread only; [`kick`] is the one thing that other threads may do to it.
//!
//! ```text
//!  enter() ──> Exit::Pio/Mmio ──> handled by the machine ──> enter()   (the instruction completes at this entry)
//!                                                      └──> complete() (completes it without running the guest)
//! ```

use std::cell::Cell;
use std::marker::PhantomData;

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
    kvm_guest_debug_arch, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};

use super::KvmError;

/// KVM_INTERRUPT: absent from kvm-ioctls; `_IOW(KVMIO, 0x86, struct kvm_interrupt)`.
const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;

/// Breakpoints of the CPU.
const BREAKPOINTS: usize = 4;
/// DR7 (Intel SDM volume 3, 18.2.4): a bit that is always one; breakpoint 0 on, for execution; all that switch one on.
const DR7_ONE: u64 = 1 << 10;
const DR7_GLOBAL_0: u64 = 1 << 1;
const DR7_ENABLES: u64 = 0xff;

/// Why the guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A port write. The bytes are in [`Vcpu::pio_data`]; `count` elements of `size` bytes (string I/O).
    PioWrite {
        /// The port.
        port: u16,
        /// Bytes per element: 1, 2 or 4.
        size: u8,
        /// Elements.
        count: u32,
    },
    /// A port read; the answer goes into [`Vcpu::pio_data`].
    PioRead {
        /// The port.
        port: u16,
        /// Bytes per element: 1, 2 or 4.
        size: u8,
        /// Elements.
        count: u32,
    },
    /// A write to guest-physical memory that is no RAM.
    MmioWrite {
        /// The address.
        gpa: u64,
        /// The bytes; the first `len` count.
        data: [u8; 8],
        /// 1 to 8.
        len: usize,
    },
    /// A read of guest-physical memory that is no RAM; answer with [`Vcpu::set_mmio_data`].
    MmioRead {
        /// The address.
        gpa: u64,
        /// 1 to 8.
        len: usize,
    },
    /// A read of an MSR that is not the guest's own state; answer with [`Vcpu::answer_msr`].
    MsrRead {
        /// The MSR.
        index: u32,
    },
    /// A write of one; answer with [`Vcpu::answer_msr`].
    MsrWrite {
        /// The MSR.
        index: u32,
        /// What is written.
        value: u64,
    },
    /// HLT was executed.
    Halt,
    /// An interrupt can be delivered now. Not an anchor.
    InterruptWindow,
    /// A single step is done, or a breakpoint reached. Not an anchor.
    Step,
    /// A signal came. Not an anchor, and nothing of the guest has changed because of it.
    Kicked,
    /// Triple fault.
    Shutdown,
}

/// The guest's vCPU.
pub struct Vcpu {
    fd: VcpuFd,
    /// It stays on the thread whose kicks reach it.
    _not_send: PhantomData<*mut u8>,
}

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread has made or entered last. Constant at first and never
    /// destroyed, so that the handler may look at it at any time.
    static KICK_TARGET: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let target = KICK_TARGET.get();
    if !target.is_null() {
        // SAFETY: the pointer is the `immediate_exit` byte of a `kvm_run` page that stays mapped until the
        // vCPU is dropped, which takes the pointer away first. A plain byte store is async-signal-safe.
        unsafe { target.write_volatile(1) };
    }
}

/// Lets [`kick`] interrupt the vCPU of this process. Call once, before the vCPU thread runs.
pub fn install_kick_handler() -> Result<(), KvmError> {
    vmm_sys_util::signal::register_signal_handler(kick_signal(), on_kick)
        .map_err(|error| KvmError::Call { call: "sigaction", source: error.into() })
}

/// The signal that [`kick`] sends, for what else shall take the vCPU out of the guest.
pub fn kick_signal() -> libc::c_int {
    vmm_sys_util::signal::SIGRTMIN()
}

/// Makes the vCPU thread leave the guest with [`Exit::Kicked`], without a race: the handler sets
/// `immediate_exit`, so a signal that lands just before KVM_RUN counts too.
pub fn kick(thread: libc::pthread_t) {
    // SAFETY: the callers hold a thread that has not been joined yet.
    unsafe { libc::pthread_kill(thread, kick_signal()) };
}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd) -> Self {
        fd.set_sync_valid_reg(SyncReg::Register);
        KICK_TARGET.set(immediate_exit(&mut fd));
        Self { fd, _not_send: PhantomData }
    }

    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Runs the guest until it leaves. Unfinished I/O of the last exit completes first.
    pub fn enter(&mut self) -> Result<Exit, KvmError> {
        KICK_TARGET.set(immediate_exit(&mut self.fd));
        match self.fd.run() {
            Ok(VcpuExit::IoIn(..)) => Ok(self.pio_exit(false)),
            Ok(VcpuExit::IoOut(..)) => Ok(self.pio_exit(true)),
            Ok(VcpuExit::MmioRead(gpa, data)) => Ok(Exit::MmioRead { gpa, len: data.len() }),
            Ok(VcpuExit::MmioWrite(gpa, bytes)) => {
                let mut data = [0; 8];
                data[..bytes.len()].copy_from_slice(bytes);
                Ok(Exit::MmioWrite { gpa, data, len: bytes.len() })
            }
            Ok(VcpuExit::X86Rdmsr(read)) => Ok(Exit::MsrRead { index: read.index }),
            Ok(VcpuExit::X86Wrmsr(write)) => Ok(Exit::MsrWrite { index: write.index, value: write.data }),
            Ok(VcpuExit::Hlt) => Ok(Exit::Halt),
            Ok(VcpuExit::IrqWindowOpen) => Ok(Exit::InterruptWindow),
            Ok(VcpuExit::Debug(_)) => Ok(Exit::Step),
            Ok(VcpuExit::Intr) => Ok(Exit::Kicked),
            Ok(VcpuExit::Shutdown) => Ok(Exit::Shutdown),
            Ok(VcpuExit::InternalError) => Err(self.internal_error()),
            Ok(other) => Err(KvmError::UnexpectedExit(format!("{other:?}"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                self.fd.set_kvm_immediate_exit(0);
                Ok(Exit::Kicked)
            }
            Err(error) => Err(KvmError::Call { call: "KVM_RUN", source: error.into() }),
        }
    }

    /// Finishes the instruction of the last exit without running the guest, so that registers may be
    /// read, changed or saved. `Some(exit)`: the instruction itself needs another exit first (an access
    /// that KVM splits); it is an anchor like any other.
    pub fn complete(&mut self) -> Result<Option<Exit>, KvmError> {
        self.fd.set_kvm_immediate_exit(1);
        let exit = self.enter();
        self.fd.set_kvm_immediate_exit(0);
        Ok(match exit? {
            Exit::Kicked => None,
            other => Some(other),
        })
    }

    fn pio_exit(&mut self, write: bool) -> Exit {
        // SAFETY: the exit reason was KVM_EXIT_IO, so `io` is the valid member of the union.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        let (port, size, count) = (io.port, io.size, io.count);
        if write { Exit::PioWrite { port, size, count } } else { Exit::PioRead { port, size, count } }
    }

    fn internal_error(&mut self) -> KvmError {
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so `internal` is the valid member.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let regs = self.last_registers();
        KvmError::UnexpectedExit(format!(
            "KVM internal error {} at rip {:#x}: the guest executed something that KVM cannot emulate",
            internal.suberror, regs.rip
        ))
    }

    /// The data of the last port exit: `size * count` bytes.
    pub fn pio_data(&mut self) -> &mut [u8] {
        let run = self.fd.get_kvm_run();
        // SAFETY: only called after a KVM_EXIT_IO exit, so `io` is the valid member of the union.
        let io = unsafe { run.__bindgen_anon_1.io };
        let start = std::ptr::from_mut(run).cast::<u8>();
        // SAFETY: the kernel keeps `data_offset + size * count` inside the mapped `kvm_run` area, and the
        // borrow of `self` keeps any other access away.
        unsafe {
            std::slice::from_raw_parts_mut(
                start.add(io.data_offset as usize),
                usize::from(io.size) * io.count as usize,
            )
        }
    }

    /// Answers an [`Exit::MmioRead`].
    pub fn set_mmio_data(&mut self, data: &[u8]) {
        // SAFETY: only called after a KVM_EXIT_MMIO exit, so `mmio` is the valid member of the union.
        let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        mmio.data[..data.len()].copy_from_slice(data);
    }

    /// Answers an [`Exit::MsrRead`] with a value, an [`Exit::MsrWrite`] with any. `None`: the guest gets a #GP.
    pub fn answer_msr(&mut self, value: Option<u64>) {
        // SAFETY: only called after a KVM_EXIT_X86_RDMSR or _WRMSR exit, so `msr` is the valid member of the union.
        let msr = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.msr };
        msr.error = u8::from(value.is_none());
        msr.data = value.unwrap_or_default();
    }

    /// General registers as of the last exit, at no cost (they were copied with the exit). After an I/O
    /// exit the instruction may be unfinished: RIP may still point at it.
    pub fn last_registers(&self) -> kvm_regs {
        self.fd.sync_regs().regs
    }

    /// Changes general registers at the next entry. RAX of an unfinished IN is overwritten by its result.
    pub fn change_registers(&mut self, change: impl FnOnce(&mut kvm_regs)) {
        change(&mut self.fd.sync_regs_mut().regs);
        self.fd.set_sync_dirty_reg(SyncReg::Register);
    }

    /// The registers now, by ioctl; finish I/O with [`Vcpu::complete`] first.
    pub fn registers(&self) -> Result<kvm_regs, KvmError> {
        self.fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))
    }

    /// Sets the registers now.
    pub fn set_registers(&self, regs: &kvm_regs) -> Result<(), KvmError> {
        self.fd.set_regs(regs).map_err(KvmError::call("KVM_SET_REGS"))
    }

    /// Segment, control and descriptor-table registers.
    pub fn special_registers(&self) -> Result<kvm_sregs, KvmError> {
        self.fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))
    }

    /// Sets segment, control and descriptor-table registers.
    pub fn set_special_registers(&self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        self.fd.set_sregs(sregs).map_err(KvmError::call("KVM_SET_SREGS"))
    }

    /// The guest-physical address of a guest-linear one, if it is mapped.
    pub fn translate(&self, linear: u64) -> Result<Option<u64>, KvmError> {
        let found = self.fd.translate_gva(linear).map_err(KvmError::call("KVM_TRANSLATE"))?;
        Ok((found.valid != 0).then_some(found.physical_address))
    }

    /// One MSR.
    pub fn msr(&self, index: u32) -> Result<u64, KvmError> {
        read_msrs(&self.fd, &[index]).map(|values| values[0])
    }

    /// May an interrupt be handed over at the next entry, as of the last exit?
    pub fn accepts_interrupt(&mut self) -> bool {
        let run = self.fd.get_kvm_run();
        run.ready_for_interrupt_injection != 0 && run.if_flag != 0
    }

    /// Does the guest have interrupts enabled, as of the last exit?
    pub fn interrupts_enabled(&mut self) -> bool {
        self.fd.get_kvm_run().if_flag != 0
    }

    /// Asks for [`Exit::InterruptWindow`] as soon as the guest can take an interrupt.
    pub fn request_window(&mut self, wanted: bool) {
        self.fd.get_kvm_run().request_interrupt_window = u8::from(wanted);
    }

    /// Hands over an interrupt; it is delivered at the next entry.
    pub fn inject(&self, vector: u8) -> Result<(), KvmError> {
        let interrupt = kvm_bindings::kvm_interrupt { irq: u32::from(vector) };
        // SAFETY: the argument is a valid `kvm_interrupt` that KVM only reads.
        let result = unsafe { vmm_sys_util::ioctl::ioctl_with_ref(&self.fd, KVM_INTERRUPT, &interrupt) };
        if result < 0 {
            return Err(KvmError::Call { call: "KVM_INTERRUPT", source: std::io::Error::last_os_error() });
        }
        Ok(())
    }

    /// Makes the guest leave with [`Exit::Step`] before it executes the instruction at the linear address `stop`;
    /// `single_step(false)` ends that.
    pub fn break_at(&self, stop: u64) -> Result<(), KvmError> {
        self.debug(KVM_GUESTDBG_USE_HW_BP, &[stop])
    }

    /// Makes the guest leave with [`Exit::Step`] after one instruction, or before one at the linear addresses `stops`,
    /// four at most; `single_step(false)` ends that.
    pub fn single_step_to(&self, stops: &[u64]) -> Result<(), KvmError> {
        self.debug(KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP, stops)
    }

    fn debug(&self, how: u32, stops: &[u64]) -> Result<(), KvmError> {
        let mut arch = kvm_guest_debug_arch::default();
        arch.debugreg[7] = DR7_ONE;
        for (index, stop) in stops.iter().enumerate().take(BREAKPOINTS) {
            arch.debugreg[index] = *stop;
            arch.debugreg[7] |= DR7_GLOBAL_0 << (2 * index);
        }
        let control = KVM_GUESTDBG_ENABLE | how;
        self.fd
            .set_guest_debug(&kvm_guest_debug { control, arch, ..Default::default() })
            .map_err(KvmError::call("KVM_SET_GUEST_DEBUG"))
    }

    /// The vector of what the guest is about to be delivered at its next entry.
    pub fn delivering(&self) -> Result<Option<u8>, KvmError> {
        let events = self.fd.get_vcpu_events().map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?;
        let exception = events.exception.injected | events.exception.pending != 0;
        let interrupt = events.interrupt.injected != 0;
        Ok(exception.then_some(events.exception.nr).or(interrupt.then_some(events.interrupt.nr)))
    }

    /// Has the guest set breakpoints of its own?
    pub fn has_breakpoints(&self) -> Result<bool, KvmError> {
        let debug = self.fd.get_debug_regs().map_err(KvmError::call("KVM_GET_DEBUGREGS"))?;
        Ok(debug.dr7 & DR7_ENABLES != 0)
    }

    /// Turns single-stepping on, or all debugging off.
    pub fn single_step(&self, on: bool) -> Result<(), KvmError> {
        if on {
            return self.debug(KVM_GUESTDBG_SINGLESTEP, &[]);
        }
        self.fd.set_guest_debug(&kvm_guest_debug::default()).map_err(KvmError::call("KVM_SET_GUEST_DEBUG"))
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if KICK_TARGET.get() == immediate_exit(&mut self.fd) {
            KICK_TARGET.set(std::ptr::null_mut());
        }
    }
}

/// Where [`kick`]'s handler says that the vCPU is to leave.
fn immediate_exit(fd: &mut VcpuFd) -> *mut u8 {
    &mut fd.get_kvm_run().immediate_exit
}

/// The values of the MSRs of these numbers, all of them.
pub(super) fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<u64>, KvmError> {
    let entries: Vec<_> =
        indices.iter().map(|&index| kvm_bindings::kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = kvm_bindings::Msrs::from_entries(&entries)
        .map_err(|error| KvmError::BadState(format!("MSR list: {error:?}")))?;
    let read = fd.get_msrs(&mut msrs).map_err(KvmError::call("KVM_GET_MSRS"))?;
    match indices.get(read) {
        None => Ok(msrs.as_slice().iter().map(|entry| entry.data).collect()),
        Some(index) => Err(KvmError::BadState(format!("MSR {index:#x} cannot be read"))),
    }
}
