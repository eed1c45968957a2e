//! Wakes threads that wait for "something changed": the driver for requests, control connections for their answer.
//!
//! Invariant: a ring between a failed check and the wait is not lost.

use crate::services::lock;
use std::sync::{Condvar, Mutex, PoisonError};

/// See the module's header.
#[derive(Debug, Default)]
pub struct Bell {
    rung: Mutex<u64>,
    changed: Condvar,
}

impl Bell {
    /// Something changed.
    pub fn ring(&self) {
        *lock(&self.rung) += 1;
        self.changed.notify_all();
    }

    /// Waits until `check` gives something; it is called again after every ring.
    pub fn wait_for<T>(&self, mut check: impl FnMut() -> Option<T>) -> T {
        loop {
            let seen = *lock(&self.rung);
            if let Some(found) = check() {
                return found;
            }
            let mut rung = lock(&self.rung);
            while *rung == seen {
                rung = self.changed.wait(rung).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn every_change_is_seen() {
        let (bell, value) = (Arc::new(Bell::default()), Arc::new(AtomicU32::new(0)));
        let (their_bell, their_value) = (bell.clone(), value.clone());
        let ringer = std::thread::spawn(move || {
            for _ in 0..1000 {
                their_value.fetch_add(1, Ordering::SeqCst);
                their_bell.ring();
            }
        });
        for wanted in [1, 500, 1000] {
            bell.wait_for(|| (value.load(Ordering::SeqCst) >= wanted).then_some(()));
        }
        ringer.join().unwrap();
    }
}
