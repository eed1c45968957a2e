//! Stopping a vCPU that is in KVM_RUN, from any thread.
//!
//! KVM_RUN returns at once while `immediate_exit` is set, and when a signal arrives. So: set the flag, then signal the
//! thread if it is in `run`. Whichever side of the system call the vCPU is on, one of the two works.
//!
//! Invariants: the flag is reached only while the vCPU exists, the thread only while it is in `run`; a kick is never
//! lost; a nudge only makes the loop look around.

use hypervisor::Kick;
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;
use sync::Mutex;

/// Between two looks of [`KickCell::wait`], which is rare and ends soon.
const WAIT_STEP: Duration = Duration::from_millis(1);

/// Nothing else in the process uses it.
fn signal_number() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

extern "C" fn nothing(_: libc::c_int) {}

/// Has the signal interrupt system calls and do nothing else.
fn install_handler() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: an all-zero `sigaction` is a valid value, and the handler does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            // Fails only for numbers that are no signals.
            libc::sigaction(signal_number(), &action, std::ptr::null_mut());
        }
    });
}

#[derive(Default)]
struct Target {
    /// `immediate_exit` in the vCPU's run structure.
    flag: Option<NonNull<u8>>,
    /// Who is in `run`.
    thread: Option<libc::pthread_t>,
}

// SAFETY: the pointer is used under the lock only, and taken away before the vCPU's mapping goes.
unsafe impl Send for Target {}

/// One vCPU as others stop it.
#[derive(Default)]
pub struct KickCell {
    wanted: AtomicBool,
    target: Mutex<Target>,
}

impl KickCell {
    /// Makes the loop look around.
    pub fn nudge(&self) {
        let target = self.target.lock();
        if let Some(flag) = target.flag {
            store(flag, 1);
        }
        if let Some(thread) = target.thread {
            // SAFETY: the thread is in `run`: it takes itself out under this lock before it leaves.
            unsafe { libc::pthread_kill(thread, signal_number()) };
        }
    }

    /// The vCPU exists: where its flag is. Taken back with `None` before its mapping goes.
    pub fn set_flag(&self, flag: Option<NonNull<u8>>) {
        self.target.lock().flag = flag;
    }

    /// The calling thread enters `run`.
    pub fn enter(&self) {
        install_handler();
        // SAFETY: asks who the calling thread is.
        self.target.lock().thread = Some(unsafe { libc::pthread_self() });
    }

    /// It leaves.
    pub fn leave(&self) {
        self.target.lock().thread = None;
    }

    /// Waits until somebody wants `run` to return, and uses that up. For vCPUs that have nothing else to do any more.
    pub fn wait(&self) {
        while !self.take() {
            std::thread::sleep(WAIT_STEP);
        }
    }

    /// KVM_RUN was interrupted: lets it go on again; whether somebody wants `run` to return.
    pub fn take(&self) -> bool {
        if let Some(flag) = self.target.lock().flag {
            store(flag, 0);
        }
        // After the flag: a kick between the two is taken here, and its flag costs one turn of the loop.
        self.wanted.swap(false, Ordering::SeqCst)
    }
}

fn store(flag: NonNull<u8>, value: u8) {
    // SAFETY: the byte is in a mapping that lives as long as the cell holds the pointer; KVM and other threads access
    // it concurrently, so atomically.
    unsafe { AtomicU8::from_ptr(flag.as_ptr()) }.store(value, Ordering::SeqCst);
}

impl Kick for KickCell {
    fn kick(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        self.nudge();
    }
}
