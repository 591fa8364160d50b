//! The guest: vCPU, memory and devices, moved from anchor to anchor.
//!
//! Owns: all guest state. Must never: read a clock, a file or a socket, or know whether it runs on a
//! primary, on a backup or from a file. What comes from outside comes through [`Clock`] (synchronous) and
//! [`Machine::apply`] (asynchronous); what goes outside leaves as [`Effect`]s.
//!
//! An *anchor* is an exit that the guest's own instructions cause, or a forced stop where none comes in time. *Boundary
//! k* is the moment after exit k has been handled; events are applied only there.
//!
//! ```text
//!   boundary k ── apply(event)* ── run_to_anchor() ─┬─ interrupt windows, host signals (not counted)
//!                                                   ├─ exit k+1, handled ──> boundary k+1
//!                                                   └─ forced stop ────────> boundary k+1
//!   boundary k ── load_checkpoint() ──> boundary k+1 (a follower's way to a forced stop)
//! ```

mod checkpoint;
mod corruption;
mod loaded_code;
mod msr;
mod state;
mod stop;
mod user_tsc;
mod window;

use devices::{Board, DeviceError, DiskOp, Effect, GuestRam};
use ft_log::{Event, GuestTime, Position, StateDigest};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};
use zerocopy::IntoBytes;

use crate::boot::{GP_PORT, RDTSC_PORT, RDTSCP_PORT};
use crate::kvm::{Exit, KvmError, Vcpu, Vm};
use crate::position::{BranchCounter, PositionError};
pub use corruption::Corruption;
pub use loaded_code::LoadedRdtscs;
pub use stop::Missed;
use stop::Name;
use user_tsc::UserTsc;

/// Where synchronous clock reads are answered: by the host's clock or by the log.
pub trait Clock {
    /// What the caller of the machine fails with.
    type Error: From<MachineError>;
    /// The time that the guest sees in the exit being handled and until its next one. Never goes back.
    fn read(&mut self) -> Result<GuestTime, Self::Error>;
    /// A host signal took the vCPU out of the guest.
    fn kicked(&mut self, machine: &Machine) -> Result<Kicked, Self::Error>;
}

/// What follows when a host signal took the vCPU out of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kicked {
    /// The guest goes on.
    GoOn,
    /// It stops here if the place has a name.
    StopIfCounted,
    /// It stops here, with a checkpoint if there is no name.
    Stop,
}

/// What can go wrong with the machine itself.
#[derive(Debug, Error)]
pub enum MachineError {
    /// KVM refused or failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device refused an event.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The saved state does not describe this machine.
    #[error("the saved machine cannot be used: {0}")]
    BadState(String),
    /// Positions of forced stops.
    #[error(transparent)]
    Position(#[from] PositionError),
    /// The kernel's #GP handler cannot be hooked.
    #[error(
        "user-mode RDTSC cannot be trapped in this guest: {0}. Use a kernel that is known to work, such as Debian's"
    )]
    UserTsc(String),
}

/// How a guest's life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It powered itself off.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// It crashed beyond recovery.
    TripleFault,
    /// It halted with interrupts disabled, so nothing can wake it.
    HaltedForever,
}

impl GuestEnd {
    /// Is it an end that the guest did not ask for? Then a fault of its host may be the reason.
    pub fn is_crash(self) -> bool {
        matches!(self, Self::TripleFault | Self::HaltedForever)
    }
}

/// What a run ended at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reached {
    /// The guest's own exit, which has been handled.
    Exit,
    /// A stop between two of its exits, which counts as an anchor.
    ForcedStop(Position),
    /// Not the stop that was asked for; the guest stands nowhere.
    Missed(Box<Missed>),
}

/// How the guest was left.
enum Left {
    Exit(Exit),
    Stop(Position),
}

/// The whole guest.
pub struct Machine {
    vcpu: Vcpu,
    vm: Vm,
    ram: GuestRam,
    board: Board,
    anchors: u64,
    registers_digest: u64,
    halted: bool,
    end: Option<GuestEnd>,
    user_tsc: UserTsc,
    /// The next anchor, if finishing an instruction led to it already.
    early_exit: Option<Exit>,
    written: Option<checkpoint::Written>,
    counter: Option<Box<dyn BranchCounter>>,
}

impl Machine {
    /// A machine at boundary 0, with its kernel loaded and its vCPU set up.
    pub fn new(vm: Vm, vcpu: Vcpu, ram: GuestRam, board: Board) -> Self {
        Self {
            vcpu,
            vm,
            ram,
            board,
            anchors: 0,
            registers_digest: 0,
            halted: false,
            end: None,
            user_tsc: UserTsc::default(),
            early_exit: None,
            written: None,
            counter: None,
        }
    }

    /// Anchors so far: the number of the boundary at which the machine stands.
    pub fn anchors(&self) -> u64 {
        self.anchors
    }

    /// A digest over the general registers at every anchor so far, and over all that the guest has put out.
    pub fn registers_digest(&self) -> u64 {
        self.registers_digest
    }

    /// The time that the devices have seen last.
    pub fn now(&self) -> GuestTime {
        self.board.now()
    }

    /// When the next timer of a device is due.
    pub fn deadline(&self) -> Option<GuestTime> {
        self.board.deadline()
    }

    /// The devices, for questions that change nothing.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Guest memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Has the guest's life ended, and how?
    pub fn end(&self) -> Option<GuestEnd> {
        self.end
    }

    /// Is the guest halted with nothing to wake it yet? Then only an event can move it.
    pub fn waiting(&self) -> bool {
        self.halted && !self.board.interrupt_pending()
    }

    /// The general registers as of the last exit, for reports.
    pub fn last_registers(&self) -> kvm_bindings::kvm_regs {
        self.vcpu.last_registers()
    }

    /// Segment, control and descriptor-table registers, for reports.
    pub fn special_registers(&self) -> Result<kvm_bindings::kvm_sregs, KvmError> {
        self.vcpu.special_registers()
    }

    /// Applies an event at the present boundary.
    pub fn apply(&mut self, event: &Event, effects: &mut Vec<Effect>) -> Result<(), MachineError> {
        let first_effect = effects.len();
        self.board.apply(&self.ram, event, effects)?;
        self.digest_effects(&effects[first_effect..]);
        Ok(())
    }

    /// Runs the guest to its next anchor and handles that exit. The guest must not be [`Self::waiting`].
    pub fn run_to_anchor<C: Clock>(
        &mut self,
        clock: &mut C,
        effects: &mut Vec<Effect>,
    ) -> Result<Reached, C::Error> {
        let left = match self.early_exit.take() {
            Some(exit) => Left::Exit(exit),
            None => self.enter(clock)?,
        };
        self.halted = false;
        match left {
            Left::Exit(exit) => self.handle(exit, clock, effects).map(|()| Reached::Exit),
            Left::Stop(position) => {
                self.anchors += 1;
                tracing::trace!(anchor = self.anchors, ?position, "forced stop");
                Ok(Reached::ForcedStop(position))
            }
        }
    }

    /// Enters the guest until an anchor or a forced stop, delivering pending interrupts at the first boundary of
    /// instructions that can take them.
    fn enter<C: Clock>(&mut self, clock: &mut C) -> Result<Left, C::Error> {
        self.vm.show_hpet(&self.board.hpet_registers());
        if let Some(counter) = &mut self.counter {
            counter.restart().map_err(MachineError::from)?;
        }
        loop {
            self.offer_interrupt()?;
            let exit = match &mut self.counter {
                Some(counter) => counter.enter(&mut self.vcpu, &self.ram).map_err(MachineError::from)?,
                None => self.vcpu.enter().map_err(MachineError::from)?,
            };
            let exit = if exit == Exit::Kicked {
                let wanted = clock.kicked(self)?;
                if wanted == Kicked::GoOn {
                    continue;
                }
                match self.name_stop()? {
                    Name::Found(position) => return Ok(Left::Stop(position)),
                    Name::Exit(exit) => exit,
                    Name::None if wanted == Kicked::Stop => return Ok(Left::Stop(Position::Checkpoint)),
                    Name::None => continue,
                }
            } else {
                exit
            };
            match exit {
                // An interrupt that waits is taken here; a guest that was to be stopped is stopped later.
                Exit::InterruptWindow => {
                    if let Some(anchor) = self.normalise_window()? {
                        return Ok(Left::Exit(anchor));
                    }
                }
                anchor => return Ok(Left::Exit(anchor)),
            }
        }
    }

    fn offer_interrupt(&mut self) -> Result<(), MachineError> {
        if self.board.interrupt_pending() && self.vcpu.accepts_interrupt() {
            let vector = self.board.acknowledge_interrupt();
            self.vcpu.inject(vector)?;
        }
        self.vcpu.request_window(self.board.interrupt_pending());
        Ok(())
    }

    fn handle<C: Clock>(
        &mut self,
        exit: Exit,
        clock: &mut C,
        effects: &mut Vec<Effect>,
    ) -> Result<(), C::Error> {
        self.anchors += 1;
        tracing::trace!(
            anchor = self.anchors,
            ?exit,
            rip = format_args!("{:#x}", self.vcpu.last_registers().rip)
        );
        self.digest_registers(&exit);
        self.board.advance(clock.read()?);
        let first_effect = effects.len();
        match exit {
            Exit::PioRead { port, size, .. } => self.port_read(port, size, effects),
            Exit::PioWrite { port, size, .. } => self.port_write(port, size, effects)?,
            Exit::MmioRead { gpa, len } => {
                let mut data = [0; 8];
                self.board.mmio_read(gpa, &mut data[..len]);
                self.vcpu.set_mmio_data(&data[..len]);
            }
            Exit::MmioWrite { gpa, data, len } => {
                self.board.mmio_write(&self.ram, gpa, &data[..len], effects);
            }
            Exit::MsrRead { index } => self.msr_read(index)?,
            Exit::MsrWrite { index, value } => {
                let taken = msr::write(index, value);
                tracing::debug!(index = format_args!("{index:#x}"), value, taken, "the guest writes an MSR");
                self.answer_msr(taken.then_some(value))?;
            }
            Exit::Halt if self.vcpu.interrupts_enabled() => self.halted = true,
            Exit::Halt => self.end = Some(GuestEnd::HaltedForever),
            Exit::Shutdown => self.end = Some(GuestEnd::TripleFault),
            Exit::InterruptWindow | Exit::Step | Exit::Kicked => {
                unreachable!("run_to_anchor hands over anchors only")
            }
        }
        self.digest_effects(&effects[first_effect..]);
        for effect in &effects[first_effect..] {
            match effect {
                Effect::PowerOff => self.end = Some(GuestEnd::PowerOff),
                Effect::Reset => self.end = Some(GuestEnd::Reset),
                _ => {}
            }
        }
        Ok(self.user_tsc.look_for_handler(self.anchors, &self.vcpu, &self.ram)?)
    }

    fn digest_registers(&mut self, exit: &Exit) {
        let regs = self.vcpu.last_registers();
        let place = match *exit {
            Exit::PioRead { port, .. } => u64::from(port) | 1 << 61,
            Exit::PioWrite { port, .. } => u64::from(port) | 1 << 60,
            Exit::MmioRead { gpa, .. } => gpa | 1 << 63,
            Exit::MmioWrite { gpa, .. } => gpa | 1 << 62,
            Exit::MsrRead { index } => u64::from(index) | 1 << 59,
            Exit::MsrWrite { index, value } => u64::from(index) ^ value.rotate_left(32) | 1 << 58,
            _ => 0,
        };
        self.registers_digest = xxh3_64_with_seed(regs.as_bytes(), self.registers_digest ^ place);
    }

    /// Memory that never shows in registers shows here before anybody outside has seen it, or at the same time.
    fn digest_effects(&mut self, effects: &[Effect]) {
        for effect in effects {
            let (place, bytes): (u64, &[u8]) = match effect {
                Effect::Frame(frame) => (1 << 57, frame),
                Effect::Console(byte) => (1 << 56, std::slice::from_ref(byte)),
                Effect::Disk(request) => match &request.op {
                    DiskOp::Write { offset_bytes, data } => (offset_bytes | 1 << 63, data),
                    DiskOp::Read { offset_bytes, len_bytes } => {
                        (offset_bytes | 1 << 62, &len_bytes.to_le_bytes())
                    }
                    DiskOp::Flush => (1 << 61, &[]),
                },
                Effect::Entropy { .. } | Effect::Reset | Effect::PowerOff => continue,
            };
            self.registers_digest = xxh3_64_with_seed(bytes, self.registers_digest ^ place);
        }
    }

    fn port_read(&mut self, port: u16, size: u8, effects: &mut Vec<Effect>) {
        if port == u16::from(RDTSC_PORT) || port == u16::from(RDTSCP_PORT) {
            let tsc = self.board.tsc();
            let low = (tsc as u32).to_le_bytes();
            for element in self.vcpu.pio_data().chunks_mut(usize::from(size)) {
                element.copy_from_slice(&low[..element.len()]);
            }
            self.vcpu.change_registers(|regs| {
                regs.rdx = tsc >> 32;
                if port == u16::from(RDTSCP_PORT) {
                    regs.rcx = 0;
                }
            });
            return;
        }
        for element in self.vcpu.pio_data().chunks_mut(usize::from(size)) {
            self.board.pio_read(port, element, effects);
        }
    }

    fn port_write(&mut self, port: u16, size: u8, effects: &mut Vec<Effect>) -> Result<(), MachineError> {
        if port == u16::from(GP_PORT) && self.user_tsc.is_hook(self.vcpu.last_registers().rip) {
            return self.general_protection();
        }
        for element in self.vcpu.pio_data().chunks(usize::from(size)) {
            self.board.pio_write(port, element, effects);
        }
        Ok(())
    }

    fn msr_read(&mut self, index: u32) -> Result<(), MachineError> {
        let answer = msr::read(index);
        tracing::debug!(index = format_args!("{index:#x}"), ?answer, "the guest reads an MSR");
        let value = match answer {
            msr::Answer::TimeStampCounter => Some(self.board.tsc()),
            msr::Answer::Value(value) => Some(value),
            msr::Answer::Fault => None,
        };
        self.answer_msr(value)
    }

    fn answer_msr(&mut self, value: Option<u64>) -> Result<(), MachineError> {
        self.vcpu.answer_msr(value);
        // At once: an interrupt that was handed over together with a #GP would be lost.
        self.early_exit = self.vcpu.complete()?;
        Ok(())
    }

    /// The guest's #GP handler was entered: supply a user-mode RDTSC, or let the handler go on.
    fn general_protection(&mut self) -> Result<(), MachineError> {
        if self.vcpu.complete()?.is_some() {
            return Err(MachineError::UserTsc("the hooked port write did not complete at once".into()));
        }
        let trap = self.user_tsc.trapped(&self.vcpu, &self.ram)?;
        let tsc = trap.is_some().then(|| self.board.tsc());
        self.user_tsc.resume(&self.vcpu, trap, tsc)
    }

    /// Finishes the last exit's instruction, so that the machine may be saved. False: the instruction
    /// needs another exit first, which is the next anchor; run to it and try again.
    pub fn settle(&mut self) -> Result<bool, MachineError> {
        if self.early_exit.is_none() {
            self.early_exit = self.vcpu.complete()?;
        }
        Ok(self.early_exit.is_none())
    }

    /// Digests of the registers so far, of all memory and of every device.
    pub fn state_digest(&self) -> StateDigest {
        let mut memory = Xxh3::new();
        for region in self.ram.iter() {
            if let Ok(slice) = region.as_volatile_slice() {
                let guard = slice.ptr_guard();
                // SAFETY: the region is mapped for `slice.len()` bytes, and the only writer, the vCPU, is
                // stopped while its thread is here.
                memory.update(unsafe { std::slice::from_raw_parts(guard.as_ptr(), slice.len()) });
            }
        }
        StateDigest {
            registers: self.registers_digest,
            memory: memory.digest(),
            devices: self.board.digest(),
        }
    }
}
