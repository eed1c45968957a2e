//! What can be asked from outside, as requests of the driver: the control socket's answers.
//!
//! Called by: [`crate::control::server`], on a thread for each connection.
//!
//! Invariant: it keeps nothing of the VM alive: a client that stays connected does not hold the machine's end up.

use crate::bell::Bell;
use crate::control::server::{Answers, Client};
use crate::control::{Answer, Ask, Files, Overlay, Status};
use crate::driver::{SaveJob, SaveJobs, WriteMachine};
use crate::engine::Engines;
use crate::host::Host;
use crate::saved_file::Save;
use crate::wire::{EngineChoice, VmSpec};
use disk_formats::NewFile;
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
    /// What it could run on.
    pub engines: Arc<Engines>,
    /// All guest time.
    pub clock: GuestClock,
    /// The driver's queue.
    pub requests: Arc<RequestQueue>,
    /// Rung with every change.
    pub bell: Arc<Bell>,
    /// Saves.
    pub saves: Arc<SaveJobs>,
}

/// A save, as it was asked for.
struct SaveAsked {
    name: PathBuf,
    and_continue: bool,
    compress: bool,
    overlays: Vec<Overlay>,
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

    fn files(&self) -> Files {
        let disks = self.host.upgrade().map_or_else(Vec::new, |host| host.present_disks());
        let written = disks.iter().filter(|disk| !disk.read_only).map(|disk| disk.path.clone()).collect();
        let present = VmSpec { disks, ..self.vm.clone() };
        Files { used: self.vm.files().into_iter().chain(present.files()).collect(), written }
    }

    /// Writes to the files that came, and waits until the save has its name: only then is it done.
    fn save(&self, asked: SaveAsked, client: &mut dyn Client) -> Answer {
        let SaveAsked { name, and_continue, compress, overlays } = asked;
        let mut files = client.files().into_iter();
        let Some(file) = files.next() else {
            return Answer::refused("no file came with it: bedplate ctl sends one");
        };
        if files.len() != overlays.len() {
            return Answer::refused("another number of files came with it than it names overlays");
        }
        let overlay = |(Overlay { of, path }, file)| (of, NewFile { file, path });
        let overlays: Vec<_> = overlays.into_iter().zip(files).map(overlay).collect();
        let overlays = and_continue.then_some(overlays);
        let (vm, host) = (self.vm.clone(), self.host.clone());
        let (written, is_written) = channel();
        let (placed, is_placed) = channel();
        let write = Box::new(move |machine: &Machine| {
            let host = host.upgrade().ok_or("the VM has ended")?;
            let save = Save { name: &name, file, vm: &vm, host: &host, compress, overlays };
            let message = save.write(machine).map_err(|error| error.to_string())?;
            // Who waits may be gone; then nobody answers, either.
            let _ = written.send(message.clone());
            is_placed.recv().map_err(|_| String::from("who asked for the save is gone"))??;
            Ok(message)
        });
        let then = if and_continue { AfterSave::Continue } else { AfterSave::Stop };
        self.have_done(
            write,
            |ticket| Request::Save { ticket, then },
            || {
                if let Ok(message) = is_written.recv() {
                    let _ = placed.send(client.place(&message));
                }
            },
        )
    }

    fn move_to(&self, choice: EngineChoice) -> Answer {
        let (host, engines) = (self.host.clone(), self.engines.clone());
        let write = Box::new(move |machine: &Machine| {
            let engine = engines.choose(choice).map_err(|error| error.to_string())?.engine;
            let host = host.upgrade().ok_or("the VM has ended")?;
            let from = machine.engine_name();
            machine.move_to(&*engine, &*host).map_err(|error| error.to_string())?;
            Ok(format!("moved from {from} to {}", machine.engine_name()))
        });
        self.have_done(write, |ticket| Request::Move { ticket }, || ())
    }

    /// Has the driver do `write` on the machine while it stands still, and waits; `meanwhile` is done here.
    fn have_done(
        &self,
        write: WriteMachine,
        request: impl FnOnce(u64) -> Request,
        meanwhile: impl FnOnce(),
    ) -> Answer {
        let (answer, answered) = channel();
        let ticket = self.saves.put(SaveJob { write, answer });
        if let Err(refused) = self.requests.ask(request(ticket)) {
            self.saves.take(ticket);
            return Answer::refused(refused.to_string());
        }
        meanwhile();
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

    fn answer(&self, ask: Ask, client: &mut dyn Client) -> Answer {
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
            Ask::Files => Answer { files: Some(self.files()), ..Answer::done(None) },
            Ask::Save { file: name, and_continue, compress, overlays } => {
                self.save(SaveAsked { name, and_continue, compress, overlays }, client)
            }
            Ask::Placed => Answer::refused("nothing waits for its place"),
        }
    }
}
