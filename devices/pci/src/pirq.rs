//! From INTx to interrupt controllers: the PIRQ lines A to H.
//!
//! Every function's INTx drives one PIRQ, shared with others. A PIRQ reaches its own I/O APIC pin always,
//! and an ISA interrupt as well when the guest routed it there through the [`crate::LpcBridge`] (ICH9
//! datasheet, 13.1.19 and 13.1.23). Lock order: shared line → router → controller.

use alloc::sync::Arc;
use alloc::vec::Vec;
use device::{IrqLine, LineSink, SharedLine};
use sync::Mutex;

/// PIRQ lines of a board, A to H.
pub const PIRQS: usize = 8;
/// Routing register: not routed to an ISA interrupt.
pub const PIRQ_OFF: u8 = 0x80;

/// The PIRQ (0 = A) of `device` on bus 0 with interrupt pin `pin` (1 = INTA). The ACPI tables say the same.
pub const fn pirq_of(device: u8, pin: u8) -> u8 {
    device.wrapping_add(pin.wrapping_sub(1)) & 7
}

struct State {
    levels: [bool; PIRQS],
    routes: [u8; PIRQS],
    apic: [IrqLine; PIRQS],
    isa: Vec<(u8, IrqLine)>,
}

impl State {
    fn drive(&mut self, restore: bool) {
        let Self { levels, routes, apic, isa } = self;
        let set = |line: &mut IrqLine, level| if restore { line.restore(level) } else { line.set(level) };
        for (line, level) in apic.iter_mut().zip(levels.iter()) {
            set(line, *level);
        }
        for (irq, line) in isa {
            let level = levels.iter().zip(routes.iter()).any(|(level, route)| *level && *route == *irq);
            set(line, level);
        }
    }
}

/// Routes the eight lines.
pub struct PirqRouter(Mutex<State>);

impl PirqRouter {
    /// The guest wrote the routing registers.
    pub(crate) fn set_routes(&self, routes: [u8; PIRQS]) {
        let mut state = self.0.lock();
        state.routes = routes;
        state.drive(false);
    }
    /// As `set_routes`, without edges.
    pub(crate) fn restore_routes(&self, routes: [u8; PIRQS]) {
        let mut state = self.0.lock();
        state.routes = routes;
        state.drive(true);
    }
    fn change(&self, pirq: u32, level: bool, restore: bool) {
        let mut state = self.0.lock();
        if let Some(slot) = state.levels.get_mut(pirq as usize) {
            *slot = level;
        }
        state.drive(restore);
    }
}

impl LineSink for PirqRouter {
    fn set_level(&self, pirq: u32, level: bool) {
        self.change(pirq, level, false);
    }
    fn restore_level(&self, pirq: u32, level: bool) {
        self.change(pirq, level, true);
    }
}

/// The board's PIRQ lines: hands out a function's INTx.
pub struct PirqLines {
    router: Arc<PirqRouter>,
    lines: Vec<Arc<SharedLine>>,
}

impl PirqLines {
    /// Lines that lead to `apic` (pins of PIRQA to PIRQH) and, as routed, to `isa` (number and line of
    /// each interrupt that a PIRQ may be routed to).
    pub fn new(apic: [IrqLine; PIRQS], isa: Vec<(u8, IrqLine)>) -> Self {
        let state = State { levels: [false; PIRQS], routes: [PIRQ_OFF; PIRQS], apic, isa };
        let router = Arc::new(PirqRouter(Mutex::new(state)));
        let lines = (0..PIRQS as u32).map(|i| SharedLine::new(router.clone(), i)).collect();
        Self { router, lines }
    }
    /// A new driver of PIRQ `pirq` (0 = A, modulo 8).
    pub fn line(&self, pirq: u8) -> IrqLine {
        self.lines[usize::from(pirq) % PIRQS].add_driver()
    }
    /// For the LPC bridge.
    pub fn router(&self) -> &Arc<PirqRouter> {
        &self.router
    }
}
