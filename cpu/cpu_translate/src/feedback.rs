//! Hot blocks: which those are, and what is learnt while they run.
//!
//! Each [`EVERY`]th time that the countdown runs out, the block that comes next is sampled (`runtime.rs`). One with [`HOT`] samples is
//! translated anew. Accesses whose address hangs on another load (`chain.rs`) then guess where in the TLB they find their page:
//! where they found the last one. The host's processor predicts that the guess is right, and need not wait for the address to
//! look anything up. A guess is compared as an entry that was looked up would be, so a wrong one costs time only (some 20 cycles for
//! the branch). Wrong ones are counted where they are corrected, out of line; an access that has too many loses its guess, in
//! one more translation.

use crate::engine::Key;
use crate::runtime;
use cpu_soft::SoftCore;
use cpu_soft::translate::GUESSES;
use hashbrown::HashMap;

/// See the module's header: a sample stands for about so many spans of the countdown.
const EVERY: u32 = 8;
/// Samples that make a block hot: a million instructions. A boot has few such blocks.
const HOT: u32 = 16;
/// Samples of a hot block between two looks at its guesses: so many that chance does not condemn any.
const LOOK: u32 = 8;
/// Executions of an access for which one wrong guess is not too many: each right one saves some 5 cycles.
const FEW: u32 = 16;

/// Samples of a block that is worth knowing how it is left: most never have so many.
const WARM: u32 = 4;
/// Samples of a way out that say something.
const ENOUGH: u32 = 3;
/// Ways out of a block that are counted.
const MOST_WAYS: usize = 64;
/// Times that a block is translated as a hot one for its way's sake.
const MOST: u32 = 3;

/// What a block's accesses guess. An access is named by its instruction's offset in the page: the same in several turns of a loop has
/// one guess.
#[derive(Debug, Default)]
pub struct Guesses {
    /// Accesses that go from page to page.
    scattered: Vec<u16>,
    /// The others.
    used: Vec<Used>,
    /// Instructions of the block.
    instructions: u32,
    /// Times that the block was translated as a hot one.
    times: u32,
}

/// An access that guesses.
#[derive(Debug)]
struct Used {
    at: u16,
    /// Number of its guess.
    guess: usize,
    /// Times that it is in the block.
    copies: u32,
}

impl Guesses {
    /// The guess of the access at `at`; `next` numbers them.
    pub fn of(&mut self, at: u16, next: &mut usize) -> Option<usize> {
        if self.scattered.contains(&at) {
            return None;
        }
        if let Some(used) = self.used.iter_mut().find(|used| used.at == at) {
            used.copies += 1;
            return Some(used.guess);
        }
        *next = (*next + 1) % GUESSES;
        self.used.push(Used { at, guess: *next, copies: 1 });
        Some(*next)
    }

    /// Takes guesses away that were wrong too often in [`LOOK`] samples; whether there were such. `misses`: how often one was,
    /// since it was asked last.
    fn judge(&mut self, mut misses: impl FnMut(usize) -> u32) -> bool {
        let before = self.scattered.len();
        // At least: not every execution comes to the end.
        let executions = LOOK * EVERY * runtime::SPAN as u32 / self.instructions.max(1);
        for used in &self.used {
            if misses(used.guess) > executions * used.copies / FEW {
                self.scattered.push(used.at);
            }
        }
        self.scattered.len() > before
    }
}

/// What is known of hot blocks.
#[derive(Default)]
pub struct Feedback {
    /// Tests: whatever runs twice is hot, and what happened once is believed.
    eager: bool,
    blocks: HashMap<Key, Guesses>,
    /// This one is to be translated anew.
    wanted: Option<Key>,
    /// By the number of a block.
    left: HashMap<u32, Left>,
}

/// A way out of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WayOut {
    /// Instructions of the block up to there.
    pub done: u16,
    /// The linear address where it leads; 0 if the interpreter's handler decides.
    pub target: u64,
}

/// How a block was left: samples.
#[derive(Clone, Debug, Default)]
pub struct Left {
    ways: Vec<(WayOut, u32)>,
    /// What one of them counts.
    weight: u32,
}

impl Left {
    /// Counts one more.
    fn count(&mut self, way: WayOut) {
        match self.ways.iter().position(|known| known.0 == way) {
            Some(n) => self.ways[n].1 += 1,
            None if self.ways.len() < MOST_WAYS => self.ways.push((way, 1)),
            None => {}
        }
    }

    /// Whether the block is mostly left behind instruction `done`, of the times that it comes there, to `offset` in a page.
    pub fn ends_at(&self, done: u16, offset: u64) -> bool {
        let (mut samples, mut ends, mut on) = (0, 0, 0);
        for (way, n) in self.ways.iter().filter(|(way, _)| way.done >= done) {
            // The countdown runs out the more likely the more instructions were done.
            let times = n * 1024 / u32::from(way.done.max(1));
            if way.done == done && (way.target ^ offset) & 0xFFF == 0 {
                (samples, ends) = (samples + n, ends + times);
            } else {
                on += times;
            }
        }
        samples * self.weight >= ENOUGH && ends >= 2 * on
    }

    /// Whether a block of so many instructions is mostly left before its end, at one place.
    fn strays(&self, instructions: u32) -> bool {
        let early = |way: &WayOut| u32::from(way.done) < instructions;
        self.ways.iter().any(|(way, _)| early(way) && self.ends_at(way.done, way.target))
    }

    /// Where its indirect branch behind so many instructions mostly leads.
    pub fn target(&self, done: u16) -> Option<u64> {
        let mut of_it = self.ways.iter().filter(|(way, _)| way.done == done && way.target != 0);
        let all: u32 = of_it.clone().map(|(_, n)| n).sum();
        of_it.find(|(_, n)| *n * self.weight >= ENOUGH && n * 4 >= all * 3).map(|(way, _)| way.target)
    }
}

/// What is known of a block that is translated anew.
#[derive(Clone, Debug, Default)]
pub struct KnownWay {
    /// See `Source::way`.
    pub way: u16,
    /// How it was left.
    pub left: Left,
}

impl Feedback {
    /// Knows nothing. `eager`: for tests.
    pub fn new(eager: bool) -> Self {
        Self { eager, ..Self::default() }
    }

    /// Whether time number `n` that the countdown runs out is a sample.
    pub fn samples(&self, n: u32) -> bool {
        self.eager || n.is_multiple_of(EVERY)
    }

    /// Block `key` has `samples` now: whether it is to be translated anew.
    pub fn sampled(&mut self, core: &mut SoftCore, key: Key, id: u32, samples: u32) -> bool {
        let known = self.left.get(&id);
        let misses = |n: usize| core::mem::take(&mut core.hot.guesses[n].misses);
        let (hot, look) = if self.eager { (2, 2) } else { (HOT, LOOK) };
        let ripe = match self.blocks.get_mut(&key) {
            None => samples.is_multiple_of(hot),
            Some(guesses) => {
                let other =
                    known.is_some_and(|known| guesses.times < MOST && known.strays(guesses.instructions));
                samples.is_multiple_of(look) && (guesses.judge(misses) || other)
            }
        };
        if ripe {
            self.wanted = Some(key);
        }
        ripe
    }

    /// Block `block`, of which there are `samples`, was left.
    pub fn leaves(&mut self, block: u32, samples: u32, way: WayOut) {
        if samples < WARM && !self.eager {
            return;
        }
        let weight = if self.eager { ENOUGH } else { 1 };
        self.left.entry(block).or_insert(Left { ways: Vec::new(), weight }).count(way);
    }

    /// How block `block` was left.
    pub fn left(&self, block: u32) -> Left {
        self.left.get(&block).cloned().unwrap_or_default()
    }

    /// Whether block `key` is to be translated anew; asks once.
    pub fn is_wanted(&mut self, key: Key) -> bool {
        self.wanted.take() == Some(key)
    }

    /// What a translation of `key` begins with if it is hot: it is if `hot`, and if it was before.
    pub fn begin(&self, key: Key, hot: bool) -> Option<Guesses> {
        let scattered = self.blocks.get(&key).map(|known| known.scattered.clone());
        (hot || scattered.is_some())
            .then(|| Guesses { scattered: scattered.unwrap_or_default(), ..Guesses::default() })
    }

    /// Block `key` of so many instructions was translated with these guesses.
    pub fn keep(&mut self, key: Key, guesses: Guesses, instructions: usize) {
        let times = self.blocks.get(&key).map_or(0, |known| known.times) + 1;
        self.blocks.insert(key, Guesses { instructions: instructions as u32, times, ..guesses });
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self { eager: self.eager, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_that_are_mostly_wrong_are_given_up() {
        let mut next = GUESSES - 1;
        let mut guesses = Guesses { instructions: 32, ..Guesses::default() };
        assert_eq!([7, 9, 7].map(|at| guesses.of(at, &mut next)), [Some(0), Some(1), Some(0)]);
        // 16,384 executions: two copies of the first, one of the second.
        assert!(!guesses.judge(|n| [2048, 1024][n]));
        assert!(guesses.judge(|n| [2048, 1025][n]));
        assert_eq!([7, 9].map(|at| guesses.of(at, &mut next)), [Some(0), None]);
        let (mut feedback, key) = (Feedback::default(), (1, 2, 3));
        assert!(feedback.begin(key, false).is_none());
        feedback.keep(key, guesses, 32);
        // What becomes of the page that was written is hot at once, and nobody's guess comes back.
        let again = feedback.begin(key, false).unwrap();
        assert_eq!((again.scattered, again.used.len()), (vec![9], 0));
        feedback.wanted = Some(key);
        assert!(feedback.is_wanted(key) && !feedback.is_wanted(key));
    }
}
