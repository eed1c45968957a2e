//! The HPET's saved state.

use super::{HpetTimer, Registers, TIMERS, config, general};
use saved_state::{FieldWriter, Fields, RestoreError, SavedState};

impl SavedState for Registers {
    const KIND: &'static str = "hpet";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { config, status, counter, timers } = self;
        w.uint(1, *config).uint(2, *status).uint(3, *counter).list(4, timers);
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let config = r.uint::<u64>(1)? & (general::ENABLE | general::LEGACY);
        let timers = r.list(4, TIMERS)?.try_into();
        Ok(Self {
            config,
            status: r.uint::<u64>(2)? & ((1 << TIMERS) - 1),
            counter: r.uint(3)?,
            timers: timers.map_err(|_| RestoreError::Value { tag: 4, reason: "not three timers" })?,
        })
    }
}

impl SavedState for HpetTimer {
    const KIND: &'static str = "hpet timer";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { config, comparator, period, message, due } = self;
        w.uint(1, *config).uint(2, *comparator).uint(3, *period).uint(4, *message);
        w.flag(5, due.is_some()).uint(6, due.unwrap_or(0));
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let config = r.uint::<u64>(1)? & config::WRITABLE;
        let (comparator, period, message) = (r.uint(2)?, r.uint(3)?, r.uint(4)?);
        let (is_due, due) = (r.flag(5)?, r.uint(6)?);
        Ok(Self { config, comparator, period, message, due: is_due.then_some(due) })
    }
}
