//! What a machine is doing, and the queue of requests that changes it.
//!
//! ```text
//!            Start            Pause
//!  Created ────────► Running ───────► Paused
//!     │                │ ▲ ▲──────────  │ ▲
//!     │                │ └┘   Resume    │ └┘ Reset, Save(continue), Move, Evade
//!     │                │ Reset, Save(continue), Move, Evade
//!     └───── Stop ─────┴───── Stop ─────┘──────► Stopped (verdict)
//! ```
//!
//! Requests come from people (control socket, console keys) and from the guest (power off, reset, triple
//! fault), from any thread. One driver takes them in order ([`Lifecycle::begin`]), does the work, and reports
//! ([`Lifecycle::finish`]). Called by `vmm`'s driver thread.
//!
//! Invariants:
//! - A request that is accepted is possible when its turn comes: it is judged against the state that the
//!   machine will have after everything before it. Only a failed action or a guest's own end can overtake it,
//!   and then it is dropped.
//! - The first verdict wins. After a stop nothing is accepted.
//! - What the guest asked for before a reset is forgotten with the reset: its processors were still running
//!   into it.

use alloc::collections::VecDeque;
use alloc::string::String;

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Built (or restored), no instruction executed since.
    Created,
    /// vCPUs run, time passes.
    Running,
    /// vCPUs are parked, devices quiet, time stands still.
    Paused,
    /// The end.
    Stopped,
}

impl State {
    /// Lower-case name, as shown to people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The guest switched itself off.
    PoweredOff,
    /// Somebody outside ended it.
    Killed,
    /// It was saved, and does not go on here.
    Saved,
    /// The guest asked for a reset, and the policy is to end then.
    ResetRefused,
    /// A processor could not deliver a fault (SDM vol. 3, 6.15: shutdown).
    TripleFault {
        /// Which one.
        vcpu: u32,
        /// Its registers in short, for people.
        detail: String,
    },
    /// The guest's kernel said that it panicked.
    Panicked {
        /// Its last words.
        detail: String,
    },
    /// The engine or the host could not go on.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What a save does with the machine afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterSave {
    /// It goes on as before.
    Continue,
    /// It ends.
    Stop,
}

/// Something that the machine is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Let it run for the first time.
    Start,
    /// Stop processors, devices and time.
    Pause,
    /// Go on.
    Resume,
    /// Back to power-on; running or paused as before.
    Reset,
    /// Save it; `ticket` says to the driver where to and who waits.
    Save {
        /// The driver's number for this save.
        ticket: u64,
        /// What comes then.
        then: AfterSave,
    },
    /// Go over to another engine; `ticket` says to the driver which, and who waits.
    Move {
        /// The driver's number for this move.
        ticket: u64,
    },
    /// The engine serves this guest badly: go over to one that serves all.
    Evade {
        /// Why.
        reason: String,
        /// Whether it can go on there; otherwise it starts again.
        sound: bool,
        /// It cannot go on where it is.
        stuck: bool,
    },
    /// End it.
    Stop(Verdict),
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Somebody outside.
    Outside,
    /// The guest's own doing.
    Guest,
}

/// A request that makes no sense in the state that the machine is in, or will be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {what} a machine that is {}", state.name())]
pub struct Refused {
    /// The request.
    pub what: &'static str,
    /// The state, once earlier requests are done.
    pub state: State,
}

/// Most requests that wait; more are refused as nonsense of the sender.
const MAX_WAITING: usize = 64;

/// See the module's header.
#[derive(Debug)]
pub struct Lifecycle {
    state: State,
    /// State after everything in `waiting` and `current` went well.
    expected: State,
    waiting: VecDeque<(Origin, Request)>,
    current: Option<Request>,
    verdict: Option<Verdict>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self::new()
    }
}

impl Lifecycle {
    /// A machine that was just built.
    pub fn new() -> Self {
        Self {
            state: State::Created,
            expected: State::Created,
            waiting: VecDeque::new(),
            current: None,
            verdict: None,
        }
    }

    /// What the machine is doing; during a request's work, what it was doing before.
    pub fn state(&self) -> State {
        self.state
    }

    /// Why it ended.
    pub fn verdict(&self) -> Option<&Verdict> {
        self.verdict.as_ref()
    }

    /// Whether nothing waits and nothing is being done.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.current.is_none()
    }

    /// Puts a request into the queue. Asking for what is already so is accepted and does nothing.
    pub fn request(&mut self, origin: Origin, request: Request) -> Result<(), Refused> {
        use State::{Created, Paused, Running, Stopped};
        let refused = |what| Err(Refused { what, state: self.expected });
        let after = match (&request, self.expected) {
            (Request::Stop(_), Stopped) => return Ok(()),
            (Request::Stop(_), _) => Stopped,
            (Request::Start, Created) => Running,
            (Request::Start, _) => return refused("start"),
            (Request::Pause, Paused) | (Request::Resume, Running) => return Ok(()),
            (Request::Pause, Running) => Paused,
            (Request::Pause, _) => return refused("pause"),
            (Request::Resume, Paused) => Running,
            (Request::Resume, _) => return refused("resume"),
            (Request::Reset, Running | Paused) => {
                if matches!(self.waiting.back(), Some((_, Request::Reset))) {
                    return Ok(());
                }
                self.expected
            }
            (Request::Reset, _) => return refused("reset"),
            (Request::Save { then: AfterSave::Stop, .. }, Running | Paused) => Stopped,
            (Request::Save { .. }, Running | Paused) => self.expected,
            (Request::Save { .. }, _) => return refused("save"),
            (Request::Evade { .. }, Running | Paused) => {
                let evades = |waiting: &(Origin, Request)| matches!(waiting.1, Request::Evade { .. });
                if self.waiting.iter().any(evades) {
                    return Ok(());
                }
                self.expected
            }
            (Request::Move { .. }, Running | Paused) => self.expected,
            (Request::Move { .. } | Request::Evade { .. }, _) => return refused("move"),
        };
        if self.waiting.len() >= MAX_WAITING && after != Stopped {
            return refused("ask any more of");
        }
        if matches!(request, Request::Stop(_)) {
            // Nothing that waits matters any more.
            self.waiting.clear();
        }
        self.waiting.push_back((origin, request));
        self.expected = after;
        Ok(())
    }

    /// The next thing to do, if any; [`Lifecycle::finish`] must follow before the next `begin`.
    pub fn begin(&mut self) -> Option<(Origin, Request)> {
        debug_assert!(self.current.is_none(), "one thing at a time");
        let (origin, request) = self.waiting.pop_front()?;
        self.current = Some(request.clone());
        Some((origin, request))
    }

    /// The work of the last `begin` is done; `ok` says whether it succeeded. A failed request leaves the state
    /// as it was (the driver has seen to that). Returns the requests that were dropped because they make no sense
    /// any more.
    pub fn finish(&mut self, ok: bool) -> VecDeque<Request> {
        let Some(request) = self.current.take() else { return VecDeque::new() };
        if ok {
            match request {
                Request::Start | Request::Resume => self.state = State::Running,
                Request::Pause => self.state = State::Paused,
                Request::Reset => self.waiting.retain(|(origin, _)| *origin != Origin::Guest),
                Request::Save { then: AfterSave::Continue, .. }
                | Request::Move { .. }
                | Request::Evade { .. } => {}
                Request::Save { then: AfterSave::Stop, .. } => self.stop(Verdict::Saved),
                Request::Stop(verdict) => self.stop(verdict),
            }
        }
        self.replan()
    }

    fn stop(&mut self, verdict: Verdict) {
        self.state = State::Stopped;
        self.verdict.get_or_insert(verdict);
    }

    /// Judges what waits anew, from the state that really is.
    fn replan(&mut self) -> VecDeque<Request> {
        let waiting = core::mem::take(&mut self.waiting);
        self.expected = self.state;
        let mut dropped = VecDeque::new();
        for (origin, request) in waiting {
            let kept = request.clone();
            if self.request(origin, kept).is_err() || self.state == State::Stopped {
                dropped.push_back(request);
            }
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Origin::{Guest, Outside};
    use proptest::prelude::*;

    fn done(life: &mut Lifecycle) -> Option<Request> {
        let request = life.begin();
        life.finish(true);
        request.map(|(_, request)| request)
    }

    #[test]
    fn runs_pauses_resumes_stops() {
        let mut life = Lifecycle::new();
        assert_eq!(
            life.request(Outside, Request::Pause),
            Err(Refused { what: "pause", state: State::Created })
        );
        life.request(Outside, Request::Start).unwrap();
        life.request(Outside, Request::Pause).unwrap();
        life.request(Outside, Request::Pause).unwrap();
        assert!(life.request(Outside, Request::Start).is_err());
        assert_eq!(done(&mut life), Some(Request::Start));
        assert_eq!(life.state(), State::Running);
        assert_eq!(done(&mut life), Some(Request::Pause));
        assert_eq!((done(&mut life), life.state()), (None, State::Paused));
        life.request(Outside, Request::Resume).unwrap();
        life.request(Guest, Request::Stop(Verdict::PoweredOff)).unwrap();
        assert!(life.request(Outside, Request::Resume).is_err());
        assert_eq!(done(&mut life), Some(Request::Stop(Verdict::PoweredOff)));
        assert_eq!((life.state(), life.verdict()), (State::Stopped, Some(&Verdict::PoweredOff)));
        life.request(Outside, Request::Stop(Verdict::Killed)).unwrap();
        assert_eq!(life.verdict(), Some(&Verdict::PoweredOff));
    }

    #[test]
    fn a_reset_forgets_what_the_guest_asked_before() {
        let mut life = Lifecycle::new();
        life.request(Outside, Request::Start).unwrap();
        done(&mut life);
        life.request(Guest, Request::Reset).unwrap();
        assert_eq!(life.begin(), Some((Guest, Request::Reset)));
        life.request(Guest, Request::Stop(Verdict::PoweredOff)).unwrap();
        assert!(life.finish(true).is_empty());
        assert_eq!((life.begin(), life.state()), (None, State::Running));
        life.request(Outside, Request::Pause).unwrap();
        assert_eq!(done(&mut life), Some(Request::Pause));
    }

    #[test]
    fn a_failed_save_drops_what_counted_on_it_and_keeps_the_state() {
        let mut life = Lifecycle::new();
        life.request(Outside, Request::Start).unwrap();
        done(&mut life);
        life.request(Outside, Request::Save { ticket: 7, then: AfterSave::Stop }).unwrap();
        assert!(life.request(Outside, Request::Pause).is_err());
        assert_eq!(life.begin(), Some((Outside, Request::Save { ticket: 7, then: AfterSave::Stop })));
        life.finish(false);
        assert_eq!(life.state(), State::Running);
        life.request(Outside, Request::Pause).unwrap();
    }

    #[test]
    fn an_engine_is_evaded_once_and_a_reset_does_not_forget_it() {
        let mut life = Lifecycle::new();
        let evade = || Request::Evade { reason: "slow".into(), sound: true, stuck: false };
        assert!(life.request(Outside, evade()).is_err());
        life.request(Outside, Request::Start).unwrap();
        done(&mut life);
        life.request(Guest, Request::Reset).unwrap();
        life.request(Outside, evade()).unwrap();
        life.request(Outside, evade()).unwrap();
        assert_eq!(done(&mut life), Some(Request::Reset));
        assert_eq!((done(&mut life), life.is_idle()), (Some(evade()), true));
        assert_eq!(life.state(), State::Running);
    }

    fn any_request() -> impl Strategy<Value = Request> {
        prop_oneof![
            Just(Request::Start),
            Just(Request::Pause),
            Just(Request::Resume),
            Just(Request::Reset),
            Just(Request::Save { ticket: 1, then: AfterSave::Stop }),
            Just(Request::Save { ticket: 2, then: AfterSave::Continue }),
            Just(Request::Move { ticket: 3 }),
            Just(Request::Evade { reason: String::new(), sound: false, stuck: true }),
            Just(Request::Stop(Verdict::Killed)),
        ]
    }

    proptest! {
        /// Whatever is asked and however the work ends: every request that begins is possible in the state that
        /// is, and nothing begins after the end.
        #[test]
        fn what_begins_is_possible(steps in proptest::collection::vec((any_request(), any::<bool>(), any::<bool>(), 0u8..4), 0..200)) {
            let mut life = Lifecycle::new();
            for (request, from_guest, ok, work) in steps {
                let origin = if from_guest { Guest } else { Outside };
                let _ = life.request(origin, request);
                if work != 0 {
                    continue;
                }
                let state = life.state();
                let Some((_, request)) = life.begin() else { continue };
                match request {
                    Request::Start => prop_assert_eq!(state, State::Created),
                    Request::Pause => prop_assert_eq!(state, State::Running),
                    Request::Resume => prop_assert_eq!(state, State::Paused),
                    Request::Reset | Request::Save { .. } | Request::Move { .. } | Request::Evade { .. } => {
                        prop_assert!(matches!(state, State::Running | State::Paused))
                    }
                    Request::Stop(_) => prop_assert_ne!(state, State::Stopped),
                }
                life.finish(ok);
                prop_assert_eq!(life.state() == State::Stopped, life.verdict().is_some());
            }
        }
    }
}
