//! Records a guest of a few hundred bytes that is stopped for its timer again and again, wherever it is.
//!
//! Usage: `small_guests record FILE BEHAVIOUR RING INTERRUPTS SOURCE`, with a position source of `--position`.
//! `vmft replay FILE` must then find it equal. `small_guests replay FILE SEED` replays one of source `step` with alarms
//! that ring late, some of them much too late: status 5 if a stop was missed for that. `small_guests compare BEHAVIOUR
//! RING` runs a guest by itself and step by step, to the same place, and says in how many steps. `small_guests aim
//! BEHAVIOUR RING` steps a guest to a branch that never comes, and says how that ended. For tests on hosts with a KVM; see
//! `tests/tests/e2e_compute.rs`.

mod behaviours;
mod code;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::bounded;
use devices::{Board, BoardConfig, GuestRam};
use ft_log::{Counted, Encoder, GuestTime, PositionSource, REGISTERS, RecordingWriter};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_sregs};
use tracing_subscriber::EnvFilter;
use vm_memory::{Bytes, GuestAddress};
use vmft::commands::CommandError;
use vmft::commands::replay::replay_with;
use vmft::guest::GuestConfig;
use vmft::host::backends::{Resources, always};
use vmft::host::deferral::Deferral;
use vmft::host::inbox::Inbox;
use vmft::kvm::{Kvm, install_kick_handler, kick, segments};
use vmft::machine::{Clock, Kicked, Machine, MachineError, Reached};
use vmft::position::{self, Step};
use vmft::run::{self, FileLog, HostSide, HostTime, Live, RunError, VcpuHandle};
use vmft::snapshot;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
/// Present, writable, for ring 3 too.
const PAGE: u64 = 7;
const USER: u64 = 4;
const LARGE_PAGE: u64 = 0x80;
const TSS_SELECTOR: u16 = 0x28;
const TSS_LIMIT: u16 = 103;

/// PG, NE, ET, MP, PE.
const CR0: u64 = 0x8000_0033;
/// OSXMMEXCPT, OSFXSR, PAE.
const CR4: u64 = 0x620;
/// LMA, LME, SCE.
const EFER: u64 = 0x501;

/// By how many branches an alarm should be late at most, and those that are later.
const SKID_MOST: u64 = 8;
const SKID_LATE: u64 = 40;
const SKID_ABSURD: u64 = 1_000;
/// How often a guest that is aimed at nothing is signalled.
const KICK_EVERY: Duration = Duration::from_millis(10);
/// Status of a replay that missed a stop.
const MISSED: u8 = 5;
/// Status of a comparison that found a difference.
const DIFFERENT: u8 = 6;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["record", file, behaviour, ring, interrupts, source] => {
            record(Path::new(file), behaviour, ring, interrupts, source)
        }
        ["replay", file, seed] => replay(Path::new(file), seed),
        ["compare", behaviour, ring] => compare(behaviour, ring),
        ["aim", behaviour, ring] => aim(behaviour, ring),
        _ => {
            eprintln!(
                "usage: small_guests record FILE BEHAVIOUR RING INTERRUPTS SOURCE | replay FILE SEED | compare \
                 BEHAVIOUR RING | aim BEHAVIOUR RING"
            );
            return ExitCode::from(2);
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("small_guests: {error}");
        ExitCode::FAILURE
    })
}

fn replay(file: &Path, seed: &str) -> Result<ExitCode, Box<dyn Error>> {
    install_kick_handler()?;
    // xorshift64; its state is never 0.
    let mut state = seed.parse::<u64>()? | 1;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let skid = move || match random(200) {
        0 => SKID_ABSURD,
        1..4 => SKID_MOST + random(SKID_LATE),
        _ => random(SKID_MOST + 1),
    };
    let step = Step::with_skid(SKID_MOST, Box::new(skid));
    match replay_with(file, false, |_| Ok(Some(Box::new(step)))) {
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(CommandError::Run(RunError::Missed(missed))) => {
            println!("{missed}");
            Ok(ExitCode::from(MISSED))
        }
        Err(error) => Err(error.into()),
    }
}

/// A guest that nothing reaches.
struct Undisturbed;

impl Clock for Undisturbed {
    type Error = MachineError;

    fn read(&mut self) -> Result<GuestTime, MachineError> {
        Ok(GuestTime(0))
    }

    fn kicked(&mut self, _: &Machine) -> Result<Kicked, MachineError> {
        Ok(Kicked::GoOn)
    }
}

fn compare(behaviour: &str, ring: &str) -> Result<ExitCode, Box<dyn Error>> {
    install_kick_handler()?;
    let mut digests = Vec::new();
    let mut steps = Arc::default();
    for stepped in [false, true] {
        let (mut machine, _) =
            guest(behaviour, ring.parse()?, u32::MAX, Pace::Turns(code::pause_turns(behaviour)))?;
        if stepped {
            let counter = Step::default();
            steps = counter.steps();
            machine.count_branches(Some(Box::new(counter)));
        }
        let mut effects = Vec::new();
        for _ in 0..code::ENTRY_EXITS + code::PAUSES {
            machine.run_to_anchor(&mut Undisturbed, &mut effects)?;
        }
        digests.push(machine.state_digest());
    }
    let steps = steps.load(Ordering::Relaxed);
    println!("by itself {:x?}, stepped {:x?}; steps={steps}", digests[0], digests[1]);
    Ok(if digests[0] == digests[1] { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) })
}

/// Steps a guest to a branch that it does not come to.
fn aim(behaviour: &str, ring: &str) -> Result<ExitCode, Box<dyn Error>> {
    install_kick_handler()?;
    let (mut machine, _) = guest(behaviour, ring.parse()?, u32::MAX, Pace::Timer(code::EVERY_50_MS))?;
    machine.count_branches(Some(Box::new(Step::default())));
    let mut effects = Vec::new();
    // The last exit is the timer's handler's; no interrupt comes after that.
    for _ in 0..=code::ENTRY_EXITS {
        machine.run_to_anchor(&mut Undisturbed, &mut effects)?;
    }
    // SAFETY: pthread_self has no preconditions.
    let target = unsafe { libc::pthread_self() };
    // A handler that runs within a step is left by signals only.
    std::thread::spawn(move || {
        loop {
            kick(target);
            std::thread::sleep(KICK_EVERY);
        }
    });
    let target = Counted { branches: u64::MAX, registers: [0; REGISTERS.len()] };
    match machine.run_to_position(&mut Undisturbed, &target)? {
        Reached::Missed(missed) => println!("{missed}"),
        other => return Err(format!("it came to {other:?}").into()),
    }
    Ok(ExitCode::from(MISSED))
}

fn record(
    file: &Path,
    behaviour: &str,
    ring: &str,
    interrupts: &str,
    source: &str,
) -> Result<ExitCode, Box<dyn Error>> {
    let (vcpu, mailbox) = VcpuHandle::new()?;
    let counter = position::choose(source.parse()?)?;
    let source = position::source_of(counter.as_deref());
    // Stepping is slow; between two interrupts there shall be more branches than an alarm may be late.
    let (divisor, budget_ms) = match source {
        PositionSource::Step => (code::EVERY_50_MS, 10),
        _ => (code::EVERY_MS, 1),
    };
    let mut machine_and_config = guest(behaviour, ring.parse()?, interrupts.parse()?, Pace::Timer(divisor))?;
    let (machine, config) = &mut machine_and_config;
    machine.count_branches(counter);
    config.positions = source;
    machine.start_checkpoints()?;
    let mut writer = RecordingWriter::create(file)?;
    snapshot::save(machine, config, writer.snapshot())?.finish()?;
    let encoder = Encoder::new(snapshot::cursor(machine));

    let (sender, receiver) = bounded(run::INBOX_EVENTS);
    let deferral = Deferral::new(Duration::from_millis(budget_ms));
    let inbox = Inbox::new(sender.clone(), Arc::clone(&deferral));
    let outlet = Resources { tap: None, disk: None }.start(&inbox, always())?;
    let _watch = deferral.watch(move || vcpu.kick())?;
    let host =
        HostSide { time: HostTime::starting_at(machine.now()), inbox: (sender, receiver), deferral, mailbox };
    let mut door = Live::new(machine, host, FileLog::new(outlet, writer, encoder));
    let stopped = run::run(machine, &mut door)?;
    println!("{stopped:?}");
    Ok(ExitCode::SUCCESS)
}

/// What makes a guest leave.
enum Pace {
    /// A port is written after so many turns of its loop; its timer is slow, too.
    Turns(u32),
    /// Nothing but its timer, with this divisor.
    Timer(u32),
}

fn guest(
    behaviour: &str,
    ring: u8,
    interrupts: u32,
    pace: Pace,
) -> Result<(Machine, GuestConfig), Box<dyn Error>> {
    let (pause_turns, pit_divisor) = match pace {
        Pace::Turns(turns) => (Some(turns), code::EVERY_50_MS),
        Pace::Timer(divisor) => (None, divisor),
    };
    let body = code::body(behaviour, pause_turns).ok_or_else(|| {
        format!("there is no behaviour '{behaviour}', only {}", behaviours::BEHAVIOURS.join(", "))
    })??;
    let kvm = Kvm::open()?;
    let memory_bytes = GuestConfig::memory_bytes(code::MEMORY_MIB)?;
    let board = BoardConfig {
        epoch_s: 0,
        ram_bytes: memory_bytes,
        net_mac: None,
        disk_bytes: None,
        disk_read_only: false,
        disk_write_through: false,
    };
    let config = GuestConfig::new(&kvm, "small", memory_bytes, board)?;
    let ram = config.allocate_ram()?;
    write_tables(&ram)?;
    for (address, bytes) in [
        (code::ENTRY, code::entry(ring, pit_divisor)?),
        (code::TIMER, code::timer(interrupts)?),
        (code::INVALID_OPCODE, code::invalid_opcode()?),
        (code::PAGE_FAULT, code::page_fault(behaviour)?),
        (code::GENERAL_PROTECTION, code::general_protection()?),
        (code::DEBUG, code::debug()?),
        (code::SOFTWARE, code::software()?),
        (code::SYSTEM_CALL, code::system_call()?),
        (code::BODY, body),
    ] {
        ram.write_slice(&bytes, GuestAddress(address))?;
    }
    let vm = kvm.create_vm(ram.clone())?;
    let vcpu = vm.create_vcpu(&config.cpuid()?)?;
    let mut sregs = vcpu.special_registers()?;
    long_mode(&mut sregs);
    vcpu.set_special_registers(&sregs)?;
    vcpu.set_registers(&kvm_regs { rip: code::ENTRY, rsp: code::STACK_0, rflags: 2, ..Default::default() })?;
    let machine = Machine::new(vm, vcpu, ram, Board::new(&config.board));
    Ok((machine, config))
}

/// Page tables that map all memory to itself, segments for both rings, handlers.
fn write_tables(ram: &GuestRam) -> Result<(), Box<dyn Error>> {
    ram.write_obj(PDPT | PAGE, GuestAddress(PML4))?;
    ram.write_obj(code::PAGE_DIRECTORY | PAGE, GuestAddress(PDPT))?;
    for index in 0..code::MEMORY_MIB / 2 {
        ram.write_obj(index << 21 | LARGE_PAGE | PAGE, GuestAddress(code::page_entry(index << 21)))?;
    }
    for page in [code::RING_0_PAGE, code::LATE_PAGE] {
        ram.write_obj(page | LARGE_PAGE | PAGE & !USER, GuestAddress(code::page_entry(page)))?;
        // What a flag would be taken out of.
        ram.write_slice(&[0xff; 0x2000], GuestAddress(page))?;
    }
    let tss = segments::tss_descriptor(code::TSS, TSS_LIMIT);
    for (index, entry) in segments::GDT_BOTH_RINGS.into_iter().chain(tss).enumerate() {
        ram.write_obj(entry, GuestAddress(GDT + index as u64 * 8))?;
    }
    // The stack for interrupts out of ring 3.
    ram.write_obj(code::STACK_0, GuestAddress(u64::from(code::TSS) + 4))?;
    for (vector, handler) in [
        (0, code::INVALID_OPCODE),
        (1, code::DEBUG),
        (6, code::INVALID_OPCODE),
        (13, code::GENERAL_PROTECTION),
        (14, code::PAGE_FAULT),
        (u64::from(code::TIMER_VECTOR), code::TIMER),
        (u64::from(code::SOFTWARE_VECTOR), code::SOFTWARE),
    ] {
        let gate = (handler & 0xffff) | u64::from(code::CODE_0) << 16 | 0xee << 40 | (handler >> 16) << 48;
        ram.write_obj(gate, GuestAddress(IDT + vector * 16))?;
    }
    Ok(())
}

fn long_mode(sregs: &mut kvm_sregs) {
    sregs.cs = segments::code_64(code::CODE_0, 0);
    let data = segments::data(code::DATA_0, 0);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.tr = segments::tss(TSS_SELECTOR, code::TSS, TSS_LIMIT);
    sregs.gdt = kvm_dtable { base: GDT, limit: 7 * 8 - 1, ..Default::default() };
    sregs.idt = kvm_dtable { base: IDT, limit: 0xfff, ..Default::default() };
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
}
