//! The engines that this program has, by name: the only place that knows them.
//!
//! Called by: `launch` (for a new VM), the desk and the driver (for a move).

use crate::kvm_verdict;
use crate::wire::EngineChoice;
use cpu_kvm::{KvmHypervisor, KvmUnavailable};
use cpu_soft::SoftHypervisor;
use hypervisor::Hypervisor;
use std::sync::Arc;

/// Why an engine cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum EngineUnavailable {
    /// The host's KVM.
    #[error("engine kvm: {0}")]
    Kvm(#[from] KvmUnavailable),
}

/// An engine that was chosen.
pub struct Chosen {
    /// It.
    pub engine: Box<dyn Hypervisor>,
    /// Why it is not the one that people may have expected, in a line.
    pub note: Option<String>,
}

type Open = fn() -> Result<Box<dyn Hypervisor>, EngineUnavailable>;

/// All of them.
const ENGINES: &[(EngineChoice, Open)] = &[
    (EngineChoice::Kvm, || Ok(Box::new(kvm()?))),
    (EngineChoice::Soft, || Ok(Box::new(SoftHypervisor::interpreter()))),
    (EngineChoice::SoftTranslate, || {
        Ok(Box::new(SoftHypervisor::translating(Arc::new(cpu_translate::Factory::default()))))
    }),
];

/// The engine that serves every guest on every host.
pub const EVERYWHERE: EngineChoice = EngineChoice::Soft;

/// The engine of `choice`. `auto` takes the fastest that works on this host.
pub fn choose(choice: EngineChoice) -> Result<Chosen, EngineUnavailable> {
    if choice == EngineChoice::Auto {
        return automatic();
    }
    let open = ENGINES.iter().find(|(name, _)| *name == choice).map_or(ENGINES[1].1, |(_, open)| *open);
    Ok(Chosen { engine: open()?, note: None })
}

/// The host's KVM, probed; once a boot.
fn kvm() -> Result<KvmHypervisor, KvmUnavailable> {
    let kvm = KvmHypervisor::open()?.with_log(|line| eprintln!("bedplate: {line}\r"));
    match kvm_verdict::known() {
        Some(probe) => kvm.remember(probe),
        None => kvm_verdict::keep(kvm.probe()),
    }
    Ok(kvm)
}

fn automatic() -> Result<Chosen, EngineUnavailable> {
    let why_not = match kvm() {
        Ok(kvm) if kvm.probe().problems.is_empty() => {
            return Ok(Chosen { engine: Box::new(kvm), note: None });
        }
        Ok(kvm) => kvm.probe().problems.join("; "),
        Err(error) => error.to_string(),
    };
    let note = format!("engine soft, because of this host's KVM: {why_not}");
    Ok(Chosen { note: Some(note), ..choose(EVERYWHERE)? })
}
