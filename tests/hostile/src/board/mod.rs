//! [`FuzzBoard`]: a whole machine with every device and the `soft` engine, played by a script: ports, registers and
//! configuration space at any width, drivers that do it nearly right, RAM under the devices' feet, code, time, a host that
//! is busy or late, resets, saves and restores.
//!
//! What must hold: no panic, no access outside of guest RAM, no end of patience; without bus mastering no device writes
//! RAM; what was saved is restored as it was; and whatever a guest did, the machine comes to rest, can be saved, and works
//! after a reset.

mod acts;
mod driver;

use acts::{Act, Whole};
use arbitrary::Unstructured;
use cpu_soft::SoftHypervisor;
use machine::saved_vm::{Reader, Record};
use machine::testing::TestMachine;
use machine::testing::ends::Mood;
use machine_spec::layout::{self, ECAM};

/// Acts of one script.
const MAX_ACTS: usize = 400;
/// Looks at the clock that one run of code may take.
const LOOKS: u64 = 4;

/// See the module's header.
pub struct FuzzBoard {
    test: TestMachine<SoftHypervisor>,
}

/// Plays a script on a new board.
pub fn run(data: &[u8]) {
    let mut script = Unstructured::new(data);
    let mut board = FuzzBoard::new();
    for _ in 0..MAX_ACTS {
        let Some(act) = script.arbitrary::<Act>().ok().filter(|_| !script.is_empty()) else { break };
        board.play(&act);
    }
    board.finish();
}

impl Default for FuzzBoard {
    fn default() -> Self {
        Self::new()
    }
}

impl FuzzBoard {
    /// A machine that was just started.
    pub fn new() -> Self {
        Self::around(TestMachine::started_on(SoftHypervisor::default()))
    }

    /// A board around a machine that runs.
    pub fn around(test: TestMachine<SoftHypervisor>) -> Self {
        // Rings on each other keep a device busy for ever; that is the guest's own loss.
        test.host.allow_restless();
        Self { test }
    }

    /// Does something with every part, as a driver would.
    pub fn stir(&mut self) {
        acts::stir().iter().for_each(|act| self.play(act));
    }

    /// The saved machine. It comes to rest first.
    pub fn saved(&mut self) -> Vec<u8> {
        self.come_to_rest();
        self.test.saved()
    }

    /// The machine can be stopped and saved, and restored; after a reset it is a machine like any.
    pub fn finish(mut self) {
        self.restore_anew();
        self.reset();
        let chipset = self.test.read(ECAM.start.0, 4);
        assert_eq!(chipset, 0x29C0_8086, "the host bridge after a reset");
        if driver::disk_is_in_its_place(&self.test) {
            driver::disk_works(&self.test);
        }
    }

    fn come_to_rest(&mut self) {
        self.test.host.ends().set_mood(Mood::default());
        for _ in 0..1000 {
            if self.test.machine.quiesce().is_ready() {
                return;
            }
            self.test.host.settle();
        }
        panic!("{:?} never come to rest", self.test.machine.busy_devices());
    }

    /// Saves, and goes on in a new machine.
    fn restore_anew(&mut self) {
        let saved = self.saved();
        let copy = TestMachine::build_on(SoftHypervisor::default(), self.test.host.again(), |spec| {
            *spec = self.test.machine.spec().clone();
        });
        let copy = copy.expect("a machine like this one");
        let mut source = &saved[..];
        let mut reader = Reader::begin(&mut source).expect("a file that was just written");
        let spec = reader.next_record().expect("a file that was just written");
        assert!(spec.is_some_and(|record| record.kind == machine::KIND_SPEC));
        copy.machine.restore(&mut reader).unwrap_or_else(|error| panic!("its own state is refused: {error}"));
        must_be_equal(&saved, &copy.saved());
        copy.machine.resume();
        copy.host.start();
        self.test = copy;
    }

    fn reset(&mut self) {
        self.come_to_rest();
        self.test.machine.reset(&self.test.host).expect("the kernel that it was started with");
        self.test.machine.resume();
    }

    /// Runs the first processor for a while.
    fn run_code(&self) {
        if let Some(kicker) = self.test.machine.kicker(0) {
            self.test.host.kick_after(LOOKS, kicker);
            self.test.machine.run_vcpu(0);
        }
        self.test.host.settle();
    }

    /// Without the bus-master bits no device touches RAM, however it is kicked.
    fn without_bus_master(&mut self) {
        for function in driver::functions() {
            let command = ECAM.start.0 + function + 4;
            let value = self.test.read(command, 2);
            self.test.write(command, 2, value & !4);
        }
        let before = self.content();
        self.test.host.ends().set_mood(Mood::default());
        driver::kick_everything(&self.test);
        self.test.host.advance(1_000_000);
        assert!(self.content() == before, "a device wrote RAM without being a bus master");
    }

    fn content(&self) -> Vec<u8> {
        let ram = self.test.machine.ram();
        let mut bytes = vec![0; ram.span_bytes() as usize];
        ram.load_bytes(0, &mut bytes);
        bytes
    }

    fn play(&mut self, act: &Act) {
        let test = &self.test;
        match act {
            Act::In { port, width } => _ = test.port_in(port.number(), width.port()),
            Act::Out { port, width, value } => test.port_out(port.number(), width.port(), value.value()),
            Act::Read { place, offset, width } => {
                _ = test.read(acts::address(test, *place, *offset), width.memory());
            }
            Act::Write { place, offset, width, value } => {
                test.write(acts::address(test, *place, *offset), width.memory(), value.value());
            }
            Act::Config(access) => access.play(test),
            Act::Store { at, value } => driver::put(test, at.address(), value.value()),
            Act::Drive(step) => step.play(test),
            Act::Arrive(frame) => test.host.ends().arrive(frame.to_vec()),
            Act::Type(text) => _ = test.host.type_text(text),
            Act::TypeAtConsole(text) => test.host.ends().type_at_console(text),
            Act::Mood { busy, late } => test.host.ends().set_mood(Mood { busy: *busy, late: *late }),
            Act::Settle => test.host.settle(),
            Act::Pass { log, more } => test.host.advance(u64::from(*more) << (log % 24)),
            Act::Acknowledge => _ = test.machine.io().pic_ack(),
            Act::Eoi(vector) => test.machine.io().eoi(*vector),
            Act::Code(code) => {
                test.machine.ram().store_bytes(machine::testing::kernel::ENTRY.into(), code);
                self.run_code();
            }
            Act::Button => test.machine.press_power_button(),
            Act::Whole(Whole::Nothing) => {}
            Act::Whole(Whole::RestoreAnew) => self.restore_anew(),
            Act::Whole(Whole::Reset) => self.reset(),
            Act::Whole(Whole::WithoutBusMaster) => self.without_bus_master(),
        }
    }
}

fn records(saved: &[u8]) -> Vec<Record> {
    let mut source = saved;
    let mut reader = Reader::begin(&mut source).expect("a file that was just written");
    std::iter::from_fn(|| reader.next_record().expect("a file that was just written")).collect()
}

fn must_be_equal(before: &[u8], after: &[u8]) {
    if before == after {
        return;
    }
    for (before, after) in records(before).iter().zip(records(after)) {
        assert!(
            *before == after,
            "restored as another:\n{}\n{}",
            before.body.escape_ascii(),
            after.body.escape_ascii()
        );
    }
    panic!("restored with more or fewer records");
}

const _: () =
    assert!(layout::RAM_MIN == machine::testing::RAM_BYTES, "devices' RAM is small, so that tests are quick");
