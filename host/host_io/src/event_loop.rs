//! One thread that waits for everything: descriptors (epoll), wake-ups (one eventfd for all), timers (one timerfd for all).
//!
//! Called by: `vmm`, for device wakers, guest timers and control sockets.
//!
//! Invariants:
//! - Callbacks run on the loop's thread only, one at a time. After a registration is dropped its callback does not run
//!   again; a drop on another thread waits until a running callback has ended (so hold no lock that it wants).
//! - Any number of `wake`s before a callback starts are one call; none is lost. A timer fires once per `set`, never early.
//! - With nothing to do the thread sleeps in the kernel.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, ThreadId};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::wake::WakeFd;

const KEY_WAKE: u64 = 0;
const KEY_TIMER: u64 = 1;
const FIRST_KEY: u64 = 2;

/// What a descriptor is watched for, and what was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Something can be read, or the other end is gone.
    pub readable: bool,
    /// Something can be written, or the other end is gone.
    pub writable: bool,
}

/// Owns the thread; dropping it ends the loop after the callback that runs now.
#[derive(Debug)]
pub struct EventLoop {
    handle: EventLoopHandle,
    thread: Option<JoinHandle<()>>,
}

/// Registers things; cheap to clone, usable from any thread, callbacks included.
#[derive(Clone, Debug)]
pub struct EventLoopHandle {
    shared: Arc<Shared>,
}

type Callback = Box<dyn FnMut(Readiness) + Send>;

struct Slot {
    key: u64,
    callback: Mutex<Option<Callback>>,
    /// A wake is on its way.
    woken: AtomicBool,
    /// The registration is gone.
    dropped: AtomicBool,
}

struct Shared {
    epoll: OwnedFd,
    timer_fd: OwnedFd,
    wake: WakeFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next_key: u64,
    slots: HashMap<u64, Arc<Slot>>,
    woken: Vec<Arc<Slot>>,
    /// Deadlines in monotonic nanoseconds, earliest first.
    timers: BTreeSet<(u64, u64)>,
    thread: Option<ThreadId>,
    ending: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoop").field("registrations", &self.lock().slots.len()).finish()
    }
}

impl EventLoop {
    /// Starts the thread, with `name` as its name in the system.
    pub fn start(name: &str) -> io::Result<EventLoop> {
        let shared = Arc::new(Shared {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            timer_fd: rustix::time::timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
            wake: WakeFd::new()?,
            state: Mutex::new(State { next_key: FIRST_KEY, ..State::default() }),
        });
        epoll::add(&shared.epoll, &shared.wake, EventData::new_u64(KEY_WAKE), EventFlags::IN)?;
        epoll::add(&shared.epoll, &shared.timer_fd, EventData::new_u64(KEY_TIMER), EventFlags::IN)?;
        let copy = shared.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            jail::enter(jail::Thread::Events, &[]);
            copy.run();
        })?;
        Ok(EventLoop { handle: EventLoopHandle { shared }, thread: Some(thread) })
    }

    /// A handle to register with.
    pub fn handle(&self) -> EventLoopHandle {
        self.handle.clone()
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        let shared = &self.handle.shared;
        shared.lock().ending = true;
        shared.wake.signal();
        let own_thread = shared.lock().thread == Some(std::thread::current().id());
        if let Some(thread) = self.thread.take()
            && !own_thread
        {
            let _ = thread.join();
        }
        let slots = std::mem::take(&mut shared.lock().slots);
        drop(slots); // Callbacks may own handles and registrations; dropped outside the lock.
    }
}

impl EventLoopHandle {
    /// Watches `fd` (level-triggered) until the registration is dropped.
    pub fn watch(
        &self,
        fd: impl AsFd,
        interest: Readiness,
        callback: impl FnMut(Readiness) + Send + 'static,
    ) -> io::Result<FdWatch> {
        // Our own duplicate: the registration ends with us, whatever happens to the caller's descriptor.
        let fd = fd.as_fd().try_clone_to_owned()?;
        let registration = self.register(Box::new(callback));
        let data = EventData::new_u64(registration.slot.key);
        epoll::add(&self.shared.epoll, &fd, data, flags(interest))?;
        Ok(FdWatch { registration, fd })
    }

    /// Makes a waker: each `wake` leads to a call of `callback` on the loop's thread.
    pub fn waker(&self, mut callback: impl FnMut() + Send + 'static) -> LoopWaker {
        LoopWaker { registration: Arc::new(self.register(Box::new(move |_| callback()))) }
    }

    /// Makes a timer that is not set; `callback` runs on the loop's thread when it expires.
    pub fn timer(&self, mut callback: impl FnMut() + Send + 'static) -> LoopTimer {
        LoopTimer { registration: self.register(Box::new(move |_| callback())), deadline: Mutex::new(None) }
    }

    fn register(&self, callback: Callback) -> Registration {
        let mut state = self.shared.lock();
        let key = state.next_key;
        state.next_key += 1;
        let slot = Arc::new(Slot {
            key,
            callback: Mutex::new(Some(callback)),
            woken: AtomicBool::new(false),
            dropped: AtomicBool::new(false),
        });
        state.slots.insert(key, slot.clone());
        Registration { shared: self.shared.clone(), slot }
    }
}

fn flags(interest: Readiness) -> EventFlags {
    let mut flags = EventFlags::empty();
    flags.set(EventFlags::IN, interest.readable);
    flags.set(EventFlags::OUT, interest.writable);
    flags
}

#[derive(Debug)]
struct Registration {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slot({})", self.key)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.slot.dropped.store(true, Ordering::Release);
        let own_thread = {
            let mut state = self.shared.lock();
            state.slots.remove(&self.slot.key);
            state.thread == Some(std::thread::current().id())
        };
        // On the loop's own thread the lock may be held further up the stack, by the very callback that drops us; the
        // callback is then freed with its slot, when it returns.
        let callback = if own_thread {
            self.slot.callback.try_lock().ok().and_then(|mut c| c.take())
        } else {
            self.slot.callback.lock().unwrap_or_else(PoisonError::into_inner).take()
        };
        drop(callback);
    }
}

/// A watched descriptor.
#[derive(Debug)]
pub struct FdWatch {
    registration: Registration,
    fd: OwnedFd,
}

impl FdWatch {
    /// Changes what the descriptor is watched for.
    pub fn set_interest(&self, interest: Readiness) -> io::Result<()> {
        let data = EventData::new_u64(self.registration.slot.key);
        Ok(epoll::modify(&self.registration.shared.epoll, &self.fd, data, flags(interest))?)
    }
}

impl Drop for FdWatch {
    fn drop(&mut self) {
        let _ = epoll::delete(&self.registration.shared.epoll, &self.fd);
    }
}

/// Wakes its callback; clones wake the same one.
#[derive(Clone, Debug)]
pub struct LoopWaker {
    registration: Arc<Registration>,
}

impl LoopWaker {
    /// Has the callback run soon. Never blocks on it.
    pub fn wake(&self) {
        let Registration { shared, slot } = &*self.registration;
        if !slot.woken.swap(true, Ordering::AcqRel) {
            shared.lock().woken.push(slot.clone());
            shared.wake.signal();
        }
    }
}

/// A one-shot timer on the host's monotonic clock.
#[derive(Debug)]
pub struct LoopTimer {
    registration: Registration,
    deadline: Mutex<Option<u64>>,
}

impl LoopTimer {
    /// Fires at `deadline_ns` (see `clock::monotonic_ns`) instead of any earlier setting, or never with `None`.
    pub fn set(&self, deadline_ns: Option<u64>) {
        let Registration { shared, slot } = &self.registration;
        let mut mine = self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = shared.lock();
        if let Some(old) = mine.take() {
            state.timers.remove(&(old, slot.key));
        }
        if let Some(new) = deadline_ns {
            state.timers.insert((new, slot.key));
            *mine = Some(new);
            if state.timers.first() == Some(&(new, slot.key)) {
                shared.arm(new);
            }
        }
        // A removed first deadline costs one idle wake-up, which is cheaper than a system call per cancel.
    }
}

impl Drop for LoopTimer {
    fn drop(&mut self) {
        self.set(None);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arm(&self, deadline_ns: u64) {
        let at = deadline_ns.max(1); // Zero would disarm.
        let it_value = Timespec { tv_sec: (at / 1_000_000_000) as i64, tv_nsec: (at % 1_000_000_000) as i64 };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = Itimerspec { it_interval, it_value };
        // Fails only for values out of range, which saturating to some centuries excludes.
        let _ = rustix::time::timerfd_settime(&self.timer_fd, TimerfdTimerFlags::ABSTIME, &spec);
    }

    fn run(&self) {
        self.lock().thread = Some(std::thread::current().id());
        let mut events = Vec::with_capacity(64);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return, // The descriptor is ours and valid; nothing sensible is left to do.
            }
            for event in &events {
                let (flags, key) = (event.flags, event.data.u64());
                match key {
                    KEY_WAKE => self.run_woken(),
                    KEY_TIMER => self.run_timers(),
                    _ => {
                        let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                        let found = Readiness {
                            readable: gone || flags.contains(EventFlags::IN),
                            writable: gone || flags.contains(EventFlags::OUT),
                        };
                        let slot = self.lock().slots.get(&key).cloned();
                        run_slot(slot, found);
                    }
                }
                if self.lock().ending {
                    return;
                }
            }
        }
    }

    fn run_woken(&self) {
        self.wake.clear();
        let woken = std::mem::take(&mut self.lock().woken);
        for slot in woken {
            slot.woken.store(false, Ordering::Release);
            run_slot(Some(slot), Readiness::default());
        }
    }

    fn run_timers(&self) {
        let _ = rustix::io::read(&self.timer_fd, &mut [0u8; 8]);
        loop {
            let mut state = self.lock();
            let Some(&(deadline, key)) = state.timers.first() else { return };
            if deadline > crate::clock::monotonic_ns() {
                return self.arm(deadline);
            }
            state.timers.pop_first();
            let slot = state.slots.get(&key).cloned();
            drop(state);
            run_slot(slot, Readiness::default());
        }
    }
}

/// Calls a slot's callback if it is still registered.
fn run_slot(slot: Option<Arc<Slot>>, found: Readiness) {
    let Some(slot) = slot else { return };
    let mut callback = slot.callback.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(callback) = callback.as_mut()
        && !slot.dropped.load(Ordering::Acquire)
    {
        callback(found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::monotonic_ns;
    use std::sync::mpsc::channel;

    #[test]
    fn every_wake_leads_to_a_call_after_it() {
        let events = EventLoop::start("test").unwrap();
        let (asked, seen) = (Arc::new(Mutex::new(0u64)), channel());
        let copy = asked.clone();
        let waker = events.handle().waker(move || seen.0.send(*copy.lock().unwrap()).unwrap());
        for round in 1..=1000 {
            *asked.lock().unwrap() = round;
            waker.clone().wake();
        }
        while seen.1.recv().unwrap() != 1000 {}
    }

    #[test]
    fn timers_fire_in_order_and_not_early() {
        let events = EventLoop::start("test").unwrap();
        let (sender, fired) = channel();
        let start = monotonic_ns();
        let timers: Vec<LoopTimer> = (0..5u64)
            .map(|i| {
                let sender = sender.clone();
                events.handle().timer(move || sender.send((i, monotonic_ns())).unwrap())
            })
            .collect();
        for i in [3u64, 1, 4, 0, 2] {
            timers[i as usize].set(Some(start + (i + 1) * 3_000_000));
        }
        timers[1].set(None);
        timers[4].set(Some(start + 40_000_000));
        timers[4].set(Some(start + 20_000_000));
        for expected in [0, 2, 3, 4] {
            let (i, at) = fired.recv().unwrap();
            assert_eq!(i, expected);
            assert!(at >= start + (i + 1) * 3_000_000);
        }
        timers[0].set(Some(0)); // A deadline in the past fires at once, and again after having fired.
        assert_eq!(fired.recv().unwrap().0, 0);
        assert!(fired.try_recv().is_err());
    }

    #[test]
    fn descriptors_are_watched_until_dropped() {
        let events = EventLoop::start("test").unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (sender, seen) = channel();
        let copy = reader.try_clone().unwrap();
        let readable = Readiness { readable: true, writable: false };
        let watch = events
            .handle()
            .watch(&reader, readable, move |found| {
                let mut byte = [0u8; 1];
                rustix::io::read(&copy, &mut byte).unwrap();
                sender.send((found, byte[0])).unwrap();
            })
            .unwrap();
        for value in 0..10 {
            rustix::io::write(&writer, &[value]).unwrap();
            assert_eq!(seen.recv().unwrap(), (readable, value));
        }
        watch.set_interest(Readiness::default()).unwrap();
        rustix::io::write(&writer, &[77]).unwrap();
        let (ping, pong) = channel();
        let ping = events.handle().waker(move || ping.send(()).unwrap());
        ping.wake();
        pong.recv().unwrap();
        assert!(seen.try_recv().is_err(), "not interested");
        watch.set_interest(readable).unwrap();
        assert_eq!(seen.recv().unwrap().1, 77);
        drop(watch);
        assert!(seen.recv().is_err(), "the callback is gone with its registration");
    }

    #[test]
    fn a_callback_may_drop_its_own_registration() {
        let events = EventLoop::start("test").unwrap();
        let place: Arc<Mutex<Option<LoopWaker>>> = Arc::default();
        let (sender, seen) = channel();
        let copy = place.clone();
        let waker = events.handle().waker(move || {
            let own = copy.lock().unwrap().take();
            if let Some(own) = &own {
                own.wake(); // Must not lead to a second call: the registration ends first.
            }
            drop(own);
            sender.send(()).unwrap();
        });
        let slot = Arc::downgrade(&waker.registration.slot);
        *place.lock().unwrap() = Some(waker);
        // No copy of it: the registration is to end in the callback.
        place.lock().unwrap().as_ref().unwrap().wake();
        seen.recv().unwrap();
        assert!(seen.recv().is_err(), "called once, then freed");
        while slot.upgrade().is_some() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn dropping_the_loop_frees_what_is_registered() {
        let events = EventLoop::start("test").unwrap();
        let owned = Arc::new(());
        let copy = owned.clone();
        let waker = events.handle().waker(move || _ = &copy);
        drop(events);
        waker.wake();
        drop(waker);
        assert_eq!(Arc::strong_count(&owned), 1);
    }
}
