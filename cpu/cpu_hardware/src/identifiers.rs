//! Tags that tell the translations of guests apart in a processor: ASIDs (APM vol. 2, 15.16) and VPIDs (SDM vol. 3C, 29.1).

use alloc::vec::Vec;
use hypervisor::EngineError;
use sync::Mutex;

/// Most identifiers that are kept account of.
const MAX: u32 = 4096;

/// Those in use. 0 is the hypervisor's own.
pub struct Identifiers(Mutex<Vec<bool>>);

impl Identifiers {
    /// Of a processor that has `count`, the hypervisor's among them.
    pub fn new(count: u32) -> Self {
        let mut used = alloc::vec![false; count.clamp(1, MAX) as usize];
        used[0] = true;
        Self(Mutex::new(used))
    }

    /// How many guests' vCPUs there can be at once.
    pub fn for_guests(&self) -> u32 {
        self.0.lock().len() as u32 - 1
    }

    /// One that nobody has.
    pub fn take(&self) -> Result<u32, EngineError> {
        let mut used = self.0.lock();
        let free =
            used.iter().position(|used| !used).ok_or(EngineError::Exhausted("address-space identifiers"))?;
        used[free] = true;
        Ok(free as u32)
    }

    /// Gives one back.
    pub fn give_back(&self, identifier: u32) {
        if let Some(used) = self.0.lock().get_mut(identifier as usize) {
            *used = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_run_out_and_come_back() {
        let all = Identifiers::new(3);
        assert_eq!((all.for_guests(), all.take().unwrap(), all.take().unwrap()), (2, 1, 2));
        assert!(matches!(all.take(), Err(EngineError::Exhausted(_))));
        all.give_back(1);
        assert_eq!(all.take().unwrap(), 1);
        assert!(matches!(Identifiers::new(0).take(), Err(EngineError::Exhausted(_))));
        assert_eq!(Identifiers::new(u32::MAX).for_guests(), MAX - 1);
    }
}
