//! How preparing a guest tells what it is doing. Progress bars are the caller's matter (the command line draws
//! them with indicatif); this crate only reports steps and amounts.

/// Hears of the steps of a preparation, on the thread that runs it.
pub trait Progress {
    /// A step begins; the previous one is over. `total` is in bytes, if the step's length is known.
    fn step(&mut self, title: &str, total: Option<u64>);
    /// The step got this far (in the unit of `total`).
    fn at(&mut self, done: u64);
    /// Something worth a line of its own.
    fn note(&mut self, text: &str);
}

/// Listens to nothing.
#[derive(Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn step(&mut self, _title: &str, _total: Option<u64>) {}
    fn at(&mut self, _done: u64) {}
    fn note(&mut self, _text: &str) {}
}
