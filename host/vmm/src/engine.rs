//! The engines that this program has, by name: the only place that knows them.
//!
//! Called by: `launch` (for a new VM), the desk and the driver (for a move).

use crate::kvm_verdict;
use crate::wire::EngineChoice;
use cpu_kvm::{KvmDevice, KvmHypervisor, KvmUnavailable, Probe};
use cpu_soft::SoftHypervisor;
use cpu_soft::translate::TranslatorFactory;
use cpu_translate::{Factory, Journal, Noted};
use hypervisor::Hypervisor;
use std::io;
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

/// The engine that serves every guest on every host.
pub const EVERYWHERE: EngineChoice = EngineChoice::Soft;

/// What engines need of the host, opened when the VM starts: later it may be out of reach.
pub struct Engines {
    kvm: io::Result<KvmDevice>,
    verdict: Option<Probe>,
    /// Hears of what is translated.
    journal: Option<Arc<Journal>>,
}

impl Engines {
    /// Opens it; `journal` hears of what is translated.
    pub fn open(journal: Option<Arc<Journal>>) -> Self {
        Self { kvm: KvmDevice::open(), verdict: kvm_verdict::known(), journal }
    }

    /// Somebody wants to hear of what is translated, but `engine` translates nothing, or not for them.
    pub fn leaves_journal_empty(&self, engine: &dyn Hypervisor) -> bool {
        self.journal.is_some() && engine.capabilities().name != "soft"
    }

    /// The engine of `choice`. `auto` takes the fastest that works on this host.
    pub fn choose(&self, choice: EngineChoice) -> Result<Chosen, EngineUnavailable> {
        let engine: Box<dyn Hypervisor> = match choice {
            EngineChoice::Auto => return self.automatic(),
            EngineChoice::Kvm => Box::new(self.kvm()?),
            EngineChoice::Soft => return Ok(soft(cpu_translate::probe(), self.journal.as_ref())),
            EngineChoice::SoftInterpreter => Box::new(SoftHypervisor::interpreter()),
            EngineChoice::SoftLockstep => Box::new(SoftHypervisor::in_lockstep(
                Arc::new(Factory::default()),
                Arc::new(|text| eprintln!("bedplate: {}\r", text.replace('\n', "\r\n"))),
            )),
        };
        Ok(Chosen { engine, note: None })
    }

    /// The host's KVM, probed; once a boot.
    fn kvm(&self) -> Result<KvmHypervisor, KvmUnavailable> {
        let device = self.kvm.as_ref().map_err(|error| KvmUnavailable::Open(again(error)))?;
        let kvm = KvmHypervisor::on(device)?.with_log(|line| eprintln!("bedplate: {line}\r"));
        match &self.verdict {
            Some(probe) => kvm.remember(probe.clone()),
            // In the jail there is no place to keep it.
            None if jail::is_armed() => _ = kvm.probe(),
            None => kvm_verdict::keep(kvm.probe()),
        }
        Ok(kvm)
    }

    fn automatic(&self) -> Result<Chosen, EngineUnavailable> {
        let why_not = match self.kvm() {
            Ok(kvm) if kvm.probe().problems.is_empty() => {
                return Ok(Chosen { engine: Box::new(kvm), note: None });
            }
            Ok(kvm) => kvm.probe().problems.join("; "),
            Err(error) => error.to_string(),
        };
        let Chosen { engine, note } = self.choose(EVERYWHERE)?;
        let more = note.map(|note| format!("; {note}")).unwrap_or_default();
        let note = format!("engine soft, because of this host's KVM: {why_not}{more}");
        Ok(Chosen { engine, note: Some(note) })
    }
}

/// The software engine: with its translator where the host lets a process make code.
fn soft(may_translate: io::Result<()>, journal: Option<&Arc<Journal>>) -> Chosen {
    match may_translate {
        Ok(()) => {
            let plain = Factory::default();
            let factory: Arc<dyn TranslatorFactory> = match journal {
                Some(journal) => Arc::new(Noted { factory: plain, journal: journal.clone() }),
                None => Arc::new(plain),
            };
            Chosen { engine: Box::new(SoftHypervisor::translating(factory)), note: None }
        }
        Err(error) => Chosen {
            engine: Box::new(SoftHypervisor::interpreter()),
            note: Some(format!(
                "engine soft interprets everything: this host lets no program make code ({error})"
            )),
        },
    }
}

/// The same error once more.
fn again(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_forbids_new_code_has_an_interpreter_and_says_why() {
        let whole = soft(Ok(()), None);
        assert!(whole.note.is_none() && whole.engine.capabilities().name == "soft");
        let without = soft(Err(io::Error::from_raw_os_error(13)), None);
        let note = without.note.unwrap();
        assert!(note.contains("interprets everything") && note.contains("Permission denied"), "{note}");
        assert_eq!(without.engine.capabilities().name, "soft,tier=interp");
    }
}
