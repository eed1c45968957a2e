//! What can be asked from outside, as requests of the driver: the control socket's answers.
//!
//! Called by: [`crate::control::server`], on a thread for each connection.
//!
//! Invariant: it keeps nothing of the VM alive: a client that stays connected does not hold the machine's end up.

use crate::bell::Bell;
use crate::control::server::Answers;
use crate::control::{Answer, Ask, Status};
use crate::driver::{SaveJob, SaveJobs, WriteMachine};
use crate::engine::{self, Chosen};
use crate::host::Host;
use crate::saved_file;
use crate::wire::{EngineChoice, VmSpec};
use guest_time::GuestClock;
use machine::{AfterSave, Machine, Request, RequestQueue, State, Verdict};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Arc, Weak};

/// See the module's header.
pub struct Desk {
    /// The resolved spec.
    pub vm: VmSpec,
    /// Its name.
    pub name: String,
    /// The machine.
    pub machine: Weak<Machine>,
    /// Its ground.
    pub host: Weak<Host>,
    /// All guest time.
    pub clock: GuestClock,
    /// The driver's queue.
    pub requests: Arc<RequestQueue>,
    /// Rung with every change.
    pub bell: Arc<Bell>,
    /// Saves.
    pub saves: Arc<SaveJobs>,
}

impl Desk {
    /// Asks, and waits until the driver has done everything that was asked so far.
    fn ask(&self, request: Request, wanted: State) -> Answer {
        if let Err(refused) = self.requests.ask(request) {
            return Answer::refused(refused.to_string());
        }
        let state = self.bell.wait_for(|| {
            let state = self.requests.state();
            (self.requests.is_idle() || state == State::Stopped).then_some(state)
        });
        if state == wanted || state == State::Stopped {
            return Answer::done(Some(format!("{} is {}", self.name, state.name())));
        }
        Answer::refused(format!("it is {} all the same; its console says why", state.name()))
    }

    fn save(&self, file: PathBuf, and_continue: bool, compress: bool) -> Answer {
        if !file.is_absolute() {
            return Answer::refused("the file's path must be absolute");
        }
        let (vm, host) = (self.vm.clone(), self.host.clone());
        let write = Box::new(move |machine: &Machine| {
            let host = host.upgrade().ok_or("the VM has ended")?;
            let save = saved_file::Save { file: &file, vm: &vm, host: &host, compress, and_continue };
            save.write(machine).map_err(|error| error.to_string())
        });
        let then = if and_continue { AfterSave::Continue } else { AfterSave::Stop };
        self.have_done(write, |ticket| Request::Save { ticket, then })
    }

    fn move_to(&self, choice: EngineChoice) -> Answer {
        let engine = match engine::choose(choice) {
            Ok(Chosen { engine, .. }) => engine,
            Err(error) => return Answer::refused(error.to_string()),
        };
        let host = self.host.clone();
        let write = Box::new(move |machine: &Machine| {
            let host = host.upgrade().ok_or("the VM has ended")?;
            let from = machine.engine_name();
            machine.move_to(&*engine, &*host).map_err(|error| error.to_string())?;
            Ok(format!("moved from {from} to {}", machine.engine_name()))
        });
        self.have_done(write, |ticket| Request::Move { ticket })
    }

    /// Has the driver do `work` on the machine while it stands still, and waits.
    fn have_done(&self, write: WriteMachine, request: impl FnOnce(u64) -> Request) -> Answer {
        let (answer, answered) = channel();
        let ticket = self.saves.put(SaveJob { write, answer });
        if let Err(refused) = self.requests.ask(request(ticket)) {
            self.saves.take(ticket);
            return Answer::refused(refused.to_string());
        }
        match answered.recv() {
            Ok(Ok(message)) => Answer::done(Some(message)),
            Ok(Err(reason)) => Answer::refused(reason),
            Err(_) => Answer::refused("the VM ended before it was done"),
        }
    }
}

impl Answers for Desk {
    fn status(&self) -> Status {
        let machine = self.machine.upgrade();
        let statistics = machine.as_ref().map(|machine| machine.statistics()).unwrap_or_default();
        Status {
            name: self.name.clone(),
            pid: std::process::id(),
            state: self.requests.state().name().into(),
            cpus: self.vm.cpus,
            memory_bytes: self.vm.memory.0,
            engine: machine.map_or("", |machine| machine.engine_name()).into(),
            uptime_ms: self.clock.now() / 1_000_000,
            instructions: statistics.instructions,
            busy_ms: statistics.busy_ns / 1_000_000,
            counts: statistics.counts.into_iter().collect(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    fn answer(&self, ask: Ask) -> Answer {
        match ask {
            Ask::Status => Answer { status: Some(self.status()), ..Answer::done(None) },
            Ask::Pause => self.ask(Request::Pause, State::Paused),
            Ask::Resume => self.ask(Request::Resume, State::Running),
            Ask::Reset => self.ask(Request::Reset, self.requests.state()),
            Ask::Kill => self.ask(Request::Stop(Verdict::Killed), State::Stopped),
            Ask::Stop => {
                if let Some(machine) = self.machine.upgrade() {
                    machine.press_power_button();
                }
                Answer::done(Some(
                    "the power button was pressed; a guest that does not listen needs kill".into(),
                ))
            }
            Ask::Move { engine } => self.move_to(engine),
            Ask::Save { file, and_continue, compress } => self.save(file, and_continue, compress),
        }
    }
}
