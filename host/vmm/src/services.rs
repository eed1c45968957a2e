//! What the machine gets from this host: time and wake-ups on the event loop.
//!
//! Called by: `machine::build`, through [`HostServices`]; the driver, when guest time stops and goes on.
//!
//! Invariant: a device is polled, and its doorbells are answered, on the event loop's thread only, with no lock held.

use device::Register;
use guest_time::{GuestClock, GuestNs, Timer};
use host_io::clock::monotonic_ns;
use host_io::event_loop::{EventLoopHandle, FdWatch, LoopTimer, Readiness};
use host_io::wake::WakeFd;
use hypervisor::Bell;
use machine::DeviceSlot;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// Makes wakers and timers for devices.
pub struct DeviceEvents {
    events: EventLoopHandle,
    clock: GuestClock,
    timers: Mutex<Vec<Weak<GuestTimer>>>,
}

impl DeviceEvents {
    /// On `events`, in the time of `clock`.
    pub fn new(events: EventLoopHandle, clock: GuestClock) -> Self {
        Self { events, clock, timers: Mutex::new(Vec::new()) }
    }

    /// The clock.
    pub fn clock(&self) -> &GuestClock {
        &self.clock
    }

    /// The event loop.
    pub fn handle(&self) -> &EventLoopHandle {
        &self.events
    }

    /// A waker that polls the device in `slot`.
    pub fn waker(&self, slot: &DeviceSlot) -> device::Waker {
        let slot = slot.clone();
        let waker = self.events.waker(move || slot.poll());
        device::Waker::new(move || waker.wake())
    }

    /// A bell that has the register of the device in `slot` written; `None` if the host has no descriptors left.
    pub fn bell(&self, slot: &DeviceSlot, register: Register) -> Option<Arc<dyn Bell>> {
        let (slot, fd) = (slot.clone(), Arc::new(WakeFd::new().ok()?));
        let readable = Readiness { readable: true, writable: false };
        let rung = fd.clone();
        let watch = self.events.watch(&*fd, readable, move |_| {
            // Silent first: a ring that comes while the device looks is another one.
            rung.clear();
            slot.ring(register);
        });
        Some(Arc::new(EventBell { fd, _watch: watch.ok()? }))
    }

    /// A timer that polls the device in `slot`.
    pub fn timer(&self, slot: &DeviceSlot) -> Box<dyn Timer> {
        let timer = Arc::new(GuestTimer {
            clock: self.clock.clone(),
            slot: slot.clone(),
            deadline: Mutex::new(None),
            host: OnceLock::new(),
        });
        let target = Arc::downgrade(&timer);
        let host = self.events.timer(move || {
            if let Some(timer) = target.upgrade() {
                timer.expired();
            }
        });
        let _ = timer.host.set(host);
        let mut timers = lock(&self.timers);
        timers.retain(|t| t.strong_count() > 0);
        timers.push(Arc::downgrade(&timer));
        Box::new(Handle(timer))
    }

    /// Guest time goes on, or goes at another rate: deadlines are translated anew.
    pub fn clock_changed(&self) {
        let timers: Vec<_> = lock(&self.timers).iter().filter_map(Weak::upgrade).collect();
        for timer in timers {
            let deadline = *lock(&timer.deadline);
            timer.set_host(deadline);
        }
    }
}

/// The lock, whatever happened to the thread that held it: what it guards is one plain value.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An eventfd that the event loop watches.
struct EventBell {
    fd: Arc<WakeFd>,
    _watch: FdWatch,
}

impl Bell for EventBell {
    fn descriptor(&self) -> i32 {
        self.fd.as_fd().as_raw_fd()
    }
}

/// A deadline in guest time on a timer of the host.
struct GuestTimer {
    clock: GuestClock,
    slot: DeviceSlot,
    deadline: Mutex<Option<GuestNs>>,
    host: OnceLock<LoopTimer>,
}

impl GuestTimer {
    fn set_host(&self, deadline: Option<GuestNs>) {
        // While guest time stands still nothing is due; `clock_changed` comes when it goes on.
        let wait = deadline.and_then(|at| self.clock.host_ns_until(at));
        if let Some(host) = self.host.get() {
            host.set(wait.map(|ns| monotonic_ns().saturating_add(ns)));
        }
    }

    fn expired(&self) {
        let mut deadline = lock(&self.deadline);
        match *deadline {
            Some(at) if self.clock.is_running() && self.clock.now() >= at => {
                *deadline = None;
                drop(deadline);
                self.slot.poll();
            }
            // Paused or slowed down meanwhile.
            later => self.set_host(later),
        }
    }
}

struct Handle(Arc<GuestTimer>);

impl Timer for Handle {
    fn arm(&self, at: GuestNs) {
        let mut deadline = lock(&self.0.deadline);
        *deadline = Some(at);
        self.0.set_host(Some(at));
    }
    fn cancel(&self) {
        let mut deadline = lock(&self.0.deadline);
        *deadline = None;
        self.0.set_host(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::{Device, IoHandler, RestoreError, StateBlob, Unsavable};
    use host_io::clock::HostClock;
    use host_io::event_loop::EventLoop;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::task::Poll;

    /// Says that it was polled, and where it was written to.
    struct Probe(Sender<Option<Register>>);
    impl IoHandler for Probe {
        fn io_read(&mut self, _: usize, _: u64, _: &mut [u8]) -> Result<(), device::IoError> {
            Err(device::IoError::Offset)
        }
        fn io_write(&mut self, region: usize, offset: u64, _: &[u8]) -> Result<(), device::IoError> {
            let _ = self.0.send(Some(Register { region, offset }));
            Ok(())
        }
    }
    impl Device for Probe {
        fn name(&self) -> &str {
            "probe"
        }
        fn as_io(&mut self) -> Option<&mut dyn IoHandler> {
            Some(self)
        }
        fn poll(&mut self) {
            let _ = self.0.send(None);
        }
        fn quiesce(&mut self) -> Poll<()> {
            Poll::Ready(())
        }
        fn resume(&mut self) {}
        fn reset(&mut self) {}
        fn save(&self) -> Result<StateBlob, Unsavable> {
            Err(Unsavable("a probe".into()))
        }
        fn restore(&mut self, _: &StateBlob) -> Result<(), RestoreError> {
            Ok(())
        }
    }

    type Shared = Arc<sync::Mutex<dyn Device>>;

    fn probe() -> (DeviceSlot, Shared, Receiver<Option<Register>>) {
        let (polled, receiver) = channel();
        let device: Shared = Arc::new(sync::Mutex::new(Probe(polled)));
        let slot = DeviceSlot::new();
        slot.fill(&device);
        (slot, device, receiver)
    }

    #[test]
    fn wakes_and_deadlines_become_polls_but_not_while_time_stands_still() {
        let events = EventLoop::start("test").unwrap();
        let clock = GuestClock::new(Box::new(HostClock));
        let host = DeviceEvents::new(events.handle(), clock.clone());
        let (slot, _device, polled) = probe();
        let waker = host.waker(&slot);
        waker.wake();
        polled.recv().unwrap();

        let timer = host.timer(&slot);
        timer.arm(1_000_000);
        assert!(polled.recv_timeout(std::time::Duration::from_millis(50)).is_err(), "time stands still");
        clock.resume();
        host.clock_changed();
        polled.recv().unwrap();
        assert!(clock.now() >= 1_000_000);
        timer.arm(0);
        polled.recv().unwrap();
        timer.arm(u64::MAX);
        timer.cancel();
    }

    #[test]
    fn a_device_that_is_gone_is_not_polled() {
        let events = EventLoop::start("test").unwrap();
        let host = DeviceEvents::new(events.handle(), GuestClock::new(Box::new(HostClock)));
        let (slot, device, polled) = probe();
        let waker = host.waker(&slot);
        drop(device);
        waker.wake();
        assert!(polled.recv().is_err(), "the device's end is dropped without a message");
    }

    #[test]
    fn a_bell_writes_to_its_register_until_it_is_gone() {
        let events = EventLoop::start("test").unwrap();
        let host = DeviceEvents::new(events.handle(), GuestClock::new(Box::new(HostClock)));
        let (slot, _device, written) = probe();
        let register = Register { region: 2, offset: 0x3004 };
        let bell = host.bell(&slot, register).unwrap();
        // As the kernel does it.
        let ring = std::fs::File::from(duplicate(bell.descriptor()));
        for _ in 0..3 {
            std::io::Write::write_all(&mut &ring, &1u64.to_ne_bytes()).unwrap();
            assert_eq!(written.recv().unwrap(), Some(register));
        }
        drop(bell);
        std::io::Write::write_all(&mut &ring, &1u64.to_ne_bytes()).unwrap();
        let later = host.waker(&slot);
        later.wake();
        assert_eq!(written.recv().unwrap(), None, "it still rings");
    }

    /// The kernel's own reference to what a number names.
    fn duplicate(descriptor: i32) -> std::os::fd::OwnedFd {
        use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
        let own = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        pidfd_getfd(own, descriptor, PidfdGetfdFlags::empty()).unwrap()
    }
}
