//! The locks of the machine. One lock type for the whole build: futex-based with the feature `hosted`,
//! spinning without (bare metal). Devices, buses and controllers name these and never a raw lock
//! (docs/adr/0003-one-lock-type.md).
#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "hosted")]
extern crate std;

#[cfg(not(feature = "hosted"))]
mod raw {
    pub type RawMutex = spin::Mutex<()>;
    pub type RawRwLock = spin::RwLock<()>;
}
#[cfg(feature = "hosted")]
mod raw {
    pub type RawMutex = parking_lot::RawMutex;
    pub type RawRwLock = parking_lot::RawRwLock;
}

/// Mutual exclusion.
pub type Mutex<T> = lock_api::Mutex<raw::RawMutex, T>;
/// Guard of a [`Mutex`].
pub type MutexGuard<'a, T> = lock_api::MutexGuard<'a, raw::RawMutex, T>;
/// Many readers or one writer.
pub type RwLock<T> = lock_api::RwLock<raw::RawRwLock, T>;
/// A value set at most once.
pub use spin::Once;

/// Lets other threads run: called in a wait that is longer than a few turns.
pub fn relax() {
    #[cfg(feature = "hosted")]
    std::thread::yield_now();
    #[cfg(not(feature = "hosted"))]
    core::hint::spin_loop();
}
