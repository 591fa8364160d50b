//! Stopping a guest at the right instruction: single steps, breakpoints, interrupt windows.
//!
//! Owns: these measurements. Must never: take one good answer for a promise where answers may differ; windows
//! are opened many times.

use super::guest::{CODE, Guest, ProbeError, Ring, Stop, Trap};
use super::{Bench, Finding};

const PORT_FIRST: u8 = 0x10;
const PORT_LAST: u8 = 0x11;

/// Branches, stack and an instruction that KVM itself carries out.
#[rustfmt::skip]
const STEPS: [u8; 15] = [
    0xb9, 3, 0, 0, 0,       // 00     mov ecx, 3
    0xff, 0xc9,             // 05  1: dec ecx
    0x75, 0xfc,             // 07     jnz 1b
    0x50,                   // 09     push rax
    0x58,                   // 0a     pop rax
    0x0f, 0xa2,             // 0b     cpuid
    0xe6, PORT_LAST,        // 0d     out PORT_LAST, al
];
/// Where the guest is after each step.
const STEPPED_TO: [u64; 10] = [0x05, 0x07, 0x05, 0x07, 0x05, 0x07, 0x09, 0x0a, 0x0b, 0x0d];
const BREAKPOINT: u64 = CODE + 0x09;

const STEP_ADVICE: &str = "use a stock KVM on VT-x or AMD-V; the monitor places interrupts by single steps";

/// Does a single step execute one instruction, whatever it is?
pub fn single_step(bench: &Bench) -> Result<Finding, ProbeError> {
    let mut guest = bench.guest(&STEPS)?;
    for ring in Ring::BOTH {
        guest.start(ring, |_| {})?;
        guest.vcpu().single_step(true)?;
        for (number, offset) in STEPPED_TO.into_iter().enumerate() {
            let stop = guest.go()?;
            let rip = guest.vcpu().last_registers().rip;
            if stop != Stop::Debug || rip != CODE + offset {
                let seen = format!(
                    "step {} in {ring} led to {stop} at {rip:#x}, not to {:#x}",
                    number + 1,
                    CODE + offset
                );
                return Ok(Finding::failed(seen, STEP_ADVICE));
            }
        }
        guest.vcpu().single_step(false)?;
        guest.expect_port(PORT_LAST, "the port behind the steps")?;
    }
    Ok(Finding::ok(format!("{} instructions, one by one, in ring 0 and ring 3", STEPPED_TO.len())))
}

/// Does the guest stop at a breakpoint of the debug registers?
pub fn breakpoints(bench: &Bench) -> Result<Finding, ProbeError> {
    let mut guest = bench.guest(&STEPS)?;
    for ring in Ring::BOTH {
        guest.start(ring, |_| {})?;
        guest.vcpu().break_at(BREAKPOINT)?;
        let stop = guest.go()?;
        let rip = guest.vcpu().last_registers().rip;
        guest.vcpu().single_step(false)?;
        match stop {
            Stop::Debug if rip == BREAKPOINT => {}
            Stop::Port(PORT_LAST) => {
                let seen = format!("a breakpoint in {ring} never fired, as on emulated hosts");
                return Ok(Finding::degraded(seen, "nothing to do: the monitor needs none"));
            }
            stop => {
                let seen =
                    format!("a breakpoint in {ring} led to {stop} at {rip:#x}, not to {BREAKPOINT:#x}");
                return Ok(Finding::degraded(seen, "nothing to do: the monitor needs none"));
            }
        }
    }
    Ok(Finding::ok("they fire in ring 0 and ring 3"))
}

/// How a guest turns interrupts on.
struct Opening {
    ring: Ring,
    code: &'static [u8],
    /// Where the window belongs.
    window: u64,
    /// Is that one instruction later than interrupts are on, as behind STI?
    shadow: bool,
}

#[rustfmt::skip]
const STI: [u8; 9] = [
    0xe6, PORT_FIRST,       // 00     out PORT_FIRST, al
    0x90,                   // 02     nop
    0xfb,                   // 03     sti
    0x90,                   // 04     nop
    0x90,                   // 05     nop
    0x90,                   // 06     nop
    0xe6, PORT_LAST,        // 07     out PORT_LAST, al
];
#[rustfmt::skip]
const POPF: [u8; 8] = [
    0xe6, PORT_FIRST,       // 00     out PORT_FIRST, al
    0x90,                   // 02     nop
    0x9d,                   // 03     popf
    0x90,                   // 04     nop
    0x90,                   // 05     nop
    0xe6, PORT_LAST,        // 06     out PORT_LAST, al
];
const OPENINGS: [Opening; 3] = [
    Opening { ring: Ring::Zero, code: &STI, window: CODE + 5, shadow: true },
    Opening { ring: Ring::Three, code: &STI, window: CODE + 5, shadow: true },
    Opening { ring: Ring::Zero, code: &POPF, window: CODE + 4, shadow: false },
];
const ROUNDS: u32 = 100;
const VECTOR: u8 = 0x40;
/// What POPF takes: interrupts on, I/O privilege for ring 3.
const RFLAGS_OPEN: u64 = 3 << 12 | 1 << 9 | 2;

/// Does an interrupt window open exactly where the guest can first take an interrupt, and does it take it
/// there?
pub fn interrupt_window(bench: &Bench) -> Result<Finding, ProbeError> {
    let (mut early, mut all) = (0, 0);
    for opening in &OPENINGS {
        let mut guest = bench.guest(opening.code)?;
        for _ in 0..ROUNDS {
            let at = match open_window(&mut guest, opening)? {
                Ok(at) => at,
                Err(seen) => return Ok(wrong_window(seen)),
            };
            all += 1;
            match opening.window.wrapping_sub(at) {
                0 => {}
                1 if opening.shadow => early += 1,
                _ => {
                    let seen =
                        format!("in {} it opened at {at:#x}, not at {:#x}", opening.ring, opening.window);
                    return Ok(wrong_window(seen));
                }
            }
        }
    }
    if early > 0 {
        let seen = format!("of {all}, {early} opened one instruction early, right behind STI");
        return Ok(Finding::degraded(seen, "nothing to do: the monitor moves those by a single step"));
    }
    Ok(Finding::ok(format!("all of {all} opened at the first instruction that can be interrupted")))
}

fn wrong_window(seen: String) -> Finding {
    Finding::failed(
        seen,
        "use a stock KVM on VT-x or AMD-V; interrupts must come where a replay can put them",
    )
}

/// Opens a window and delivers an interrupt in it. Where it was, or what happened instead.
fn open_window(guest: &mut Guest, opening: &Opening) -> Result<Result<u64, String>, ProbeError> {
    let Opening { ring, .. } = *opening;
    let mut stack = 0;
    guest.start(ring, |regs| stack = regs.rsp)?;
    guest.write(stack, RFLAGS_OPEN)?;
    guest.expect_port(PORT_FIRST, "the port before the window")?;
    guest.vcpu().request_window(true);
    let stop = guest.go()?;
    guest.vcpu().request_window(false);
    let at = guest.vcpu().last_registers().rip;
    if stop != Stop::Window {
        return Ok(Err(format!("in {ring} the guest went to {stop} and not to a window")));
    }
    if !guest.vcpu().accepts_interrupt() {
        return Ok(Err(format!("in {ring} it opened at {at:#x}, but no interrupt may be handed over there")));
    }
    guest.vcpu().inject(VECTOR)?;
    match guest.go()? {
        Stop::Trap(trap) if trap == (Trap { vector: VECTOR, rip: at, ring }) => Ok(Ok(at)),
        stop => Ok(Err(format!("in {ring} an interrupt that was handed over at {at:#x} led to {stop}"))),
    }
}
