//! The hot tier of the `soft` engine: translates 64-bit and flat 32-bit guest code to host code of the same architecture.
//!
//! Plugs into `cpu_soft` (`cpu_soft::translate` is the seam, docs/adr/0006-translator.md the reasons). Whatever is
//! not emitted inline is a call of the interpreter's handler, so that every instruction is covered.
//!
//! - `engine.rs`: translations of one vCPU, entry and exit; `engine/ways.rs`: from one to another, `engine/record.rs`: what is
//!   kept of one. `runtime.rs`: what emitted code calls.
//! - `code_memory.rs`: where the code lies; `budget.rs`: how much of it. `table.rs`: where indirect branches look. `thunks.rs`: the fixed pieces of code.
//! - `block.rs`: a superblock from its bytes, `path.rs`: which way it takes. `plan.rs`: which instruction is emitted how; `liveness.rs`: flags.
//! - `feedback.rs`: which blocks are hot, and what is learnt of them; `chain.rs`: accesses that wait for other loads.
//! - `elide.rs`: which memory accesses share a check. `vector.rs`: SSE and AVX. `x87.rs`: the x87 unit.
//! - `journal.rs`: what was translated, for people and for `perf`.
//! - `emit/`: the emission itself. `asm.rs`, `encoding.rs`: bytes.
//!
//! Host registers in emitted code: `asm::CONTEXT` is the `SoftCore`, the GS base is guest RAM, RSP the
//! thread's own stack; see `emit::home` for the guest's registers.

mod asm;
mod block;
mod budget;
mod chain;
mod code_memory;
mod elide;
mod emit;
mod encoding;
mod engine;
mod feedback;
#[cfg(test)]
mod golden;
mod host;
mod journal;
mod liveness;
mod path;
mod plan;
mod runtime;
mod table;
mod thunks;
mod vector;
mod x87;

pub use journal::Journal;

use budget::Budget;
use cpu_soft::translate::{Translator, TranslatorFactory};
use engine::Engine;
use guest_memory::GuestRam;
use std::sync::Arc;
use x86_defs::cpuid::FeatureSet;

/// Times that the interpreter runs a block before it is translated.
pub const THRESHOLD: u32 = 16;

/// Whether this host lets a process make code: it may forbid executable mappings (SELinux' `execmem`).
///
/// # Errors
/// What the kernel answered.
pub fn probe() -> std::io::Result<()> {
    code_memory::CodeMemory::new(4096).map(drop)
}

/// Makes translators for this host.
#[derive(Clone, Copy, Debug)]
pub struct Factory {
    /// Times that the interpreter runs a block before it is translated; 0 translates everything.
    pub threshold: u32,
}

impl Default for Factory {
    fn default() -> Self {
        Self { threshold: THRESHOLD }
    }
}

impl TranslatorFactory for Factory {
    fn create(&self, ram: &GuestRam, features: FeatureSet, vcpus: usize) -> Option<Box<dyn Translator>> {
        Some(Box::new(Engine::new(ram, features, self.threshold, Budget::of(vcpus)).ok()?))
    }
}

/// As [`Factory`], with all that is translated noted.
#[derive(Clone, Debug)]
pub struct Noted {
    /// Makes the translators.
    pub factory: Factory,
    /// Hears of what they translate.
    pub journal: Arc<Journal>,
}

impl TranslatorFactory for Noted {
    fn create(&self, ram: &GuestRam, features: FeatureSet, vcpus: usize) -> Option<Box<dyn Translator>> {
        let mut engine = Engine::new(ram, features, self.factory.threshold, Budget::of(vcpus)).ok()?;
        engine.journal = Some(self.journal.clone());
        Some(Box::new(engine))
    }
}

/// As [`Factory`], with room for a few blocks only, so that everything is dropped all the time: for tests.
#[derive(Clone, Copy, Debug)]
pub struct Crowded(pub Factory);

impl TranslatorFactory for Crowded {
    fn create(&self, ram: &GuestRam, features: FeatureSet, _: usize) -> Option<Box<dyn Translator>> {
        let budget = Budget::with_code(engine::BLOCK_BYTES + CROWDED_BYTES);
        Some(Box::new(Engine::new(ram, features, self.0.threshold, budget).ok()?))
    }
}

/// Code of [`Crowded`] before it is full.
const CROWDED_BYTES: usize = 8 << 10;
