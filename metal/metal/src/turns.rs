//! Whose turn it is: everybody who has something to do gets one before anybody gets a second.
//!
//! Called by: the scheduler, with its vCPUs counted through. How long a turn is does not matter here: one that a timer
//! cuts short is a turn all the same, so that short ones are short for all.

/// See the module's header.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turns {
    /// Who is asked first.
    next: usize,
}

impl Turns {
    /// Asks each of `count` once, in turn, until one has run; whether one had. `run` says whether it did.
    pub fn take(&mut self, count: usize, mut run: impl FnMut(usize) -> bool) -> bool {
        let ran = (0..count).map(|n| (self.next + n) % count).find(|one| run(*one));
        if let Some(one) = ran {
            self.next = (one + 1) % count;
        }
        ran.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    #[test]
    fn nobody_is_left_out() {
        let mut turns = Turns::default();
        let mut order = Vec::new();
        for _ in 0..9 {
            // The first always has something to do, the second never, the others do.
            assert!(turns.take(4, |one| {
                if one != 1 {
                    order.push(one);
                }
                one != 1
            }));
        }
        assert_eq!(order, vec![0, 2, 3, 0, 2, 3, 0, 2, 3]);
        assert!(!turns.take(4, |_| false));
        assert!(!turns.take(0, |_| true));
    }
}
