//! The one thread that changes what the machine is doing: it takes requests in order, does the work, reports.
//!
//! Called by: `launch`, on the process's main thread.
//!
//! Invariants: whatever stops the machine follows the same steps (park vCPUs, quiesce devices, stop time), whatever
//! lets it go on the same steps backwards; a request that fails leaves the machine as it was.

use crate::bell::Bell;
use crate::engine::{self, Engines};
use crate::host::Host;
use crate::services::lock;
use crate::vcpu_threads::VcpuThreads;
use crate::wire::{OnPanic, OnReset};
use machine::{AfterSave, HostServices, Machine, Origin, PanicWatch, Request, RequestQueue, State, Verdict};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long vCPUs may take to stop; on a host that is very busy, too.
const PARK_TIME: Duration = Duration::from_secs(120);
/// The same for those of a VM that cannot go on.
const FAILED_PARK_TIME: Duration = Duration::from_secs(5);
/// How long devices may take to finish what is in flight.
const QUIESCE_TIME: Duration = Duration::from_secs(60);
const QUIESCE_STEP: Duration = Duration::from_millis(1);

/// What the spec says about ends.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    /// On a guest's reset.
    pub on_reset: OnReset,
    /// On a guest kernel's panic.
    pub on_panic: OnPanic,
}

/// Writes a machine that stands still.
pub type WriteMachine = Box<dyn FnOnce(&Machine) -> Result<String, String> + Send>;

/// A save or a move that somebody waits for.
pub struct SaveJob {
    /// Writes the machine, which stands still; gives a sentence for people.
    pub write: WriteMachine,
    /// Who waits.
    pub answer: Sender<Result<String, String>>,
}

/// Saves that were asked for, by ticket.
#[derive(Default)]
pub struct SaveJobs {
    next: AtomicU64,
    jobs: Mutex<HashMap<u64, SaveJob>>,
}

impl SaveJobs {
    /// Keeps `job`; its ticket.
    pub fn put(&self, job: SaveJob) -> u64 {
        let ticket = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.jobs).insert(ticket, job);
        ticket
    }

    /// Takes a job out.
    pub fn take(&self, ticket: u64) -> Option<SaveJob> {
        lock(&self.jobs).remove(&ticket)
    }
}

/// What the machine does after a request was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// It runs.
    Go,
    /// What it does already.
    AsItIs,
}

/// See the module's header.
pub struct Driver {
    /// The machine.
    pub machine: Arc<Machine>,
    /// Its ground.
    pub host: Arc<Host>,
    /// What it could run on.
    pub engines: Arc<Engines>,
    /// What is asked.
    pub requests: Arc<RequestQueue>,
    /// Rung when something was asked.
    pub bell: Arc<Bell>,
    /// The vCPUs.
    pub threads: VcpuThreads,
    /// What the guest's kernel said.
    pub watch: Arc<PanicWatch>,
    /// Saves.
    pub saves: Arc<SaveJobs>,
    /// Ends.
    pub policy: Policy,
    /// It was booted by this process, not brought back from a file.
    pub booted_here: bool,
}

impl Driver {
    /// Works until the machine has ended; why it did.
    pub fn run(&self) -> Verdict {
        loop {
            let (origin, request) = self.bell.wait_for(|| self.requests.begin());
            let result = self.perform(origin, &request);
            if let Err(reason) = &result {
                self.after_failure(&request, reason);
            }
            for dropped in self.requests.finish(result.is_ok()) {
                self.drop_request(&dropped);
            }
            if let Some(verdict) = self.requests.verdict() {
                return verdict;
            }
            // Last: what the guest asks from here on belongs to what comes, not to what was.
            if result.unwrap_or(After::AsItIs) == After::Go {
                self.go();
            }
        }
    }

    fn perform(&self, origin: Origin, request: &Request) -> Result<After, String> {
        match request {
            Request::Start | Request::Resume => Ok(After::Go),
            Request::Pause => self.stand_still().map(|()| After::AsItIs),
            Request::Reset => self.reset(origin),
            Request::Save { ticket, then } => self.save(*ticket, *then),
            Request::Move { ticket } => self.save(*ticket, AfterSave::Continue),
            Request::Evade { reason, sound, stuck } => self.evade(reason, *sound, *stuck),
            Request::Stop(verdict) => {
                self.host.gate().close();
                // A processor that hangs ends with the process; where it is known to, soon.
                let failed = matches!(verdict, Verdict::Failed { .. });
                let _ = self.threads.park(if failed { FAILED_PARK_TIME } else { PARK_TIME });
                // Work in flight is finished, so that what the guest wrote reaches its disks; if it cannot be,
                // ending is still right.
                let _ = self.quiesce();
                self.host.clock().pause();
                Ok(After::AsItIs)
            }
        }
    }

    /// Lets everything run.
    fn go(&self) {
        self.host.clock().resume();
        self.host.events().clock_changed();
        self.machine.resume();
        self.threads.release();
        self.host.gate().open();
    }

    /// Stops everything; on an error everything runs again.
    fn stand_still(&self) -> Result<(), String> {
        self.host.gate().close();
        self.park()?;
        if let Err(reason) = self.quiesce() {
            self.go();
            return Err(reason);
        }
        self.host.clock().pause();
        Ok(())
    }

    /// Parks the vCPUs. One that cannot be stopped is the machine's end: its state is lost.
    fn park(&self) -> Result<(), String> {
        self.threads.park(PARK_TIME).map_err(|running| {
            let (engine, seconds) = (self.machine.engine_name(), PARK_TIME.as_secs());
            let reason = format!("{running} CPUs did not come out of engine {engine} within {seconds} s");
            self.end(Verdict::Failed { reason: reason.clone() });
            reason
        })
    }

    fn quiesce(&self) -> Result<(), String> {
        let deadline = Instant::now() + QUIESCE_TIME;
        while self.machine.quiesce().is_pending() {
            if Instant::now() >= deadline {
                let busy = self.machine.busy_devices().join(", ");
                return Err(format!("{busy} did not finish within {} s", QUIESCE_TIME.as_secs()));
            }
            std::thread::sleep(QUIESCE_STEP);
        }
        Ok(())
    }

    fn reset(&self, origin: Origin) -> Result<After, String> {
        let was_running = self.requests.state() == State::Running;
        if was_running {
            self.stand_still()?;
        }
        if origin == Origin::Guest {
            let panic = self.watch.panicked().filter(|_| self.policy.on_panic == OnPanic::Stop);
            let end = match (panic, self.policy.on_reset) {
                (Some(detail), _) => Some(Verdict::Panicked { detail }),
                (None, OnReset::Stop) => Some(Verdict::ResetRefused),
                (None, OnReset::Reboot) => None,
            };
            if let Some(verdict) = end {
                // The reset itself "fails": everything stands still, and the stop comes next.
                self.end(verdict);
                return Err("the machine ends instead".into());
            }
        }
        self.boot_again()?;
        Ok(if was_running { After::Go } else { After::AsItIs })
    }

    fn end(&self, verdict: Verdict) {
        // Refused only when it has ended already.
        let _ = self.requests.ask(Request::Stop(verdict));
    }

    fn save(&self, ticket: u64, then: AfterSave) -> Result<After, String> {
        let Some(SaveJob { write, answer }) = self.saves.take(ticket) else {
            return Err("nobody waits for this save".into());
        };
        let was_running = self.requests.state() == State::Running;
        let result = match if was_running { self.stand_still() } else { Ok(()) } {
            Ok(()) => {
                let written = write(&self.machine);
                if was_running && written.is_err() {
                    self.go();
                }
                written
            }
            Err(reason) => Err(reason),
        };
        // Who asked may be gone.
        let _ = answer.send(result.clone());
        let goes_on = was_running && then == AfterSave::Continue;
        result.map(|_| if goes_on { After::Go } else { After::AsItIs })
    }

    /// Goes over to the engine that serves every guest. One that cannot go on there goes back to where it came from.
    fn evade(&self, reason: &str, sound: bool, stuck: bool) -> Result<After, String> {
        let chosen = self.engines.choose(engine::EVERYWHERE).map_err(|error| error.to_string())?;
        let (from, to) = (self.machine.engine_name(), chosen.engine.capabilities().name);
        if from == to {
            return Ok(After::AsItIs);
        }
        let was_running = self.requests.state() == State::Running;
        if was_running {
            self.stand_still()?;
        }
        let after = if was_running { After::Go } else { After::AsItIs };
        if let Err(error) = self.machine.move_to(&*chosen.engine, &*self.host) {
            let reason = format!("{reason}, and it cannot go on on {to}: {error}");
            if stuck {
                self.end(Verdict::Failed { reason: reason.clone() });
                return Err(reason);
            }
            // It stays: slow is better than not at all.
            eprintln!("bedplate: {reason}\r");
            return Ok(after);
        }
        if sound {
            eprintln!("bedplate: {reason}; it goes on on {to}\r");
            return Ok(after);
        }
        if !self.booted_here {
            let reason = format!("{reason}, and what it showed the guest no other engine can");
            self.end(Verdict::Failed { reason: reason.clone() });
            return Err(reason);
        }
        eprintln!(
            "bedplate: {reason}, and showed it another processor than its CPU model; it starts again on {to}\r"
        );
        self.boot_again()?;
        Ok(after)
    }

    /// Back to power-up; a failure is the end.
    fn boot_again(&self) -> Result<(), String> {
        self.watch.forget();
        self.machine.reset(&*self.host).map_err(|error| {
            let reason = format!("cannot boot again: {error}");
            self.end(Verdict::Failed { reason: reason.clone() });
            reason
        })
    }

    fn after_failure(&self, request: &Request, reason: &str) {
        if matches!(request, Request::Pause | Request::Resume | Request::Start) {
            eprintln!("bedplate: {reason}\r");
        }
    }

    fn drop_request(&self, request: &Request) {
        if let Request::Save { ticket, .. } | Request::Move { ticket } = request
            && let Some(job) = self.saves.take(*ticket)
        {
            let _ = job.answer.send(Err("the machine ended before it was done".into()));
        }
    }
}
