//! Finds vCPUs that do not come out of their engine: a processor that hangs is the VM's end, with an error that says so, and not
//! only when somebody wants to stop it.
//!
//! Called by: `launch`, which starts it; the event loop, once in [`STEP_NS`].
//!
//! Invariant: a vCPU that comes out when it is kicked is never told of, however long it stays in otherwise.

use crate::services::lock;
use crate::vcpu_threads::Turns;
use host_io::clock::monotonic_ns;
use host_io::event_loop::{EventLoopHandle, LoopTimer};
use std::sync::{Arc, Mutex, OnceLock};

/// Between two looks.
const STEP_NS: u64 = 40_000_000_000;
/// Looks in a row that find a vCPU where it was, kicked each time, before it counts as hanging; its thread may wait for a host
/// that is very busy.
const LOOKS: u32 = 3;

/// What was seen of a vCPU.
#[derive(Clone, Copy, Default)]
struct Seen {
    turn: u64,
    /// Looks in a row that found it in that turn.
    looks: u32,
}

/// The vCPUs of a VM as they were seen.
pub struct HangWatch {
    turns: Arc<Turns>,
    seen: Vec<Seen>,
}

impl HangWatch {
    /// For the vCPUs of `turns`.
    pub fn new(turns: Arc<Turns>) -> Self {
        let seen = vec![Seen::default(); turns.count()];
        Self { turns, seen }
    }

    /// Looks at all of them and kicks those that are in their engine. Gives one that hangs, and for how many seconds.
    pub fn look(&mut self, kick: impl Fn(u32)) -> Option<(u32, u64)> {
        for (id, seen) in (0..).zip(&mut self.seen) {
            match self.turns.running(id) {
                Some(turn) if turn == seen.turn => seen.looks += 1,
                turn => *seen = Seen { turn: turn.unwrap_or(0), looks: u32::from(turn.is_some()) },
            }
            if seen.looks > LOOKS {
                return Some((id, u64::from(LOOKS) * STEP_NS / 1_000_000_000));
            }
            if seen.looks > 0 {
                kick(id);
            }
        }
        None
    }
}

/// Looks again and again, until it is dropped.
pub struct Looking {
    watch: Mutex<HangWatch>,
    timer: OnceLock<LoopTimer>,
}

impl Looking {
    /// Starts on `events`. `hangs` hears of a vCPU that does, and for how many seconds it did not come out; then it is over.
    pub fn start(
        events: &EventLoopHandle,
        turns: Arc<Turns>,
        kick: impl Fn(u32) + Send + 'static,
        hangs: impl Fn(u32, u64) + Send + 'static,
    ) -> Arc<Self> {
        let looking = Arc::new(Self { watch: Mutex::new(HangWatch::new(turns)), timer: OnceLock::new() });
        let weak = Arc::downgrade(&looking);
        let timer = events.timer(move || {
            let Some(looking) = weak.upgrade() else { return };
            match lock(&looking.watch).look(&kick) {
                Some((id, seconds)) => hangs(id, seconds),
                None => looking.again(),
            }
        });
        let _ = looking.timer.set(timer);
        looking.again();
        looking
    }

    fn again(&self) {
        if let Some(timer) = self.timer.get() {
            timer.set(Some(monotonic_ns().saturating_add(STEP_NS)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn who_does_not_come_out_is_told_of_and_nobody_else() {
        let turns = Arc::new(Turns::new(3));
        let mut watch = HangWatch::new(turns.clone());
        let kicked = RefCell::new(Vec::new());
        let look = |watch: &mut HangWatch| {
            let found = watch.look(|id| kicked.borrow_mut().push(id));
            (found, kicked.take())
        };
        // 0 comes out at each kick, 1 is halted, 2 hangs from its second turn on.
        turns.enter(2);
        turns.leave(2);
        turns.enter(2);
        for _ in 0..LOOKS {
            turns.enter(0);
            assert_eq!(look(&mut watch), (None, vec![0, 2]));
            turns.leave(0);
        }
        assert_eq!(look(&mut watch).0, Some((2, 120)));
        turns.leave(2);
        turns.enter(2);
        assert_eq!(look(&mut watch), (None, vec![2]), "it has come out after all");
        turns.leave(2);
        assert_eq!(look(&mut watch), (None, vec![]));
    }
}
