//! The thread that brings guest, sockets and time together, and the port that the guest's NIC holds.
//!
//! Called by: `usernet::UserNet::start`; the port by virtio-net's backend.
//!
//! Invariants: both queues between guest and thread are bounded; a `Busy` is followed by `wake`; the thread sleeps in
//! epoll when there is nothing to do, and ends with the port.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use smoltcp::time::Instant;

use super::UserNetError;
use super::addresses::MTU;
use super::config::UserNetConfig;
use super::nat::Nat;
use super::sockets::{FORWARD_TOKEN, Linux, configuration_files};
use super::world::FlowId;
use crate::net::{Busy, NetPort};
use crate::wake::WakeFd;

const WAKE_TOKEN: u64 = 0;
/// Frames of the guest that may wait for the thread.
const FROM_GUEST_FRAMES: usize = 512;
/// A throttled thread is woken when this few frames are left for the guest.
const RESUME_FRAMES: usize = 128;
/// The largest Ethernet frame that fits the link (with room for a VLAN tag, which is then ignored).
const MAX_FRAME: usize = 14 + 4 + MTU as usize;

/// The guest's end of a user-mode network. Dropping it ends the network and every connection.
#[derive(Debug)]
pub struct UserNetPort {
    shared: Arc<Shared>,
    forwards: Vec<SocketAddr>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    from_guest: Mutex<FromGuest>,
    to_guest: Mutex<VecDeque<Vec<u8>>>,
    /// The thread waits until the guest takes frames.
    throttled: AtomicBool,
    ending: AtomicBool,
    bell: WakeFd,
    wake: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct FromGuest {
    frames: VecDeque<Vec<u8>>,
    /// A frame was refused; the guest waits for `wake`.
    refused: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserNet").field("to_guest", &lock(&self.to_guest).len()).finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl UserNetPort {
    pub(super) fn start(
        config: UserNetConfig,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Result<UserNetPort, UserNetError> {
        let start = |error: std::io::Error| UserNetError::Start(error);
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|e| start(e.into()))?;
        let shared = Arc::new(Shared {
            from_guest: Mutex::default(),
            to_guest: Mutex::default(),
            throttled: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            bell: WakeFd::new().map_err(start)?,
            wake,
        });
        epoll::add(&epoll, &shared.bell, EventData::new_u64(WAKE_TOKEN), EventFlags::IN)
            .map_err(|e| start(e.into()))?;
        let waiter = epoll.try_clone().map_err(start)?;
        let linux = Linux::new(epoll, &config.forwards, config.resolvers.clone())?;
        let forwards = linux.forward_addresses();
        let pending = vec![false; config.forwards.len()];
        let driver = Driver { shared: shared.clone(), nat: Nat::new(config, linux), epoll: waiter, pending };
        let run = move || {
            jail::enter(jail::Thread::Network, &configuration_files());
            driver.run();
        };
        let thread = std::thread::Builder::new().name("usernet".into()).spawn(run).map_err(start)?;
        Ok(UserNetPort { shared, forwards, thread: Some(thread) })
    }

    /// Where the forwarded ports really listen, in the order of the configuration.
    pub fn forwards(&self) -> &[SocketAddr] {
        &self.forwards
    }
}

impl NetPort for UserNetPort {
    fn send(&self, frame: &[u8]) -> Result<(), Busy> {
        if frame.len() > MAX_FRAME {
            return Ok(());
        }
        let mut queue = lock(&self.shared.from_guest);
        if queue.frames.len() >= FROM_GUEST_FRAMES {
            queue.refused = true;
            return Err(Busy);
        }
        queue.frames.push_back(frame.to_vec());
        let first = queue.frames.len() == 1;
        drop(queue);
        if first {
            self.shared.bell.signal();
        }
        Ok(())
    }

    fn try_recv(&self, frame: &mut Vec<u8>) -> bool {
        frame.clear();
        let mut queue = lock(&self.shared.to_guest);
        let next = queue.pop_front();
        let left = queue.len();
        drop(queue);
        if left <= RESUME_FRAMES && self.shared.throttled.swap(false, Ordering::AcqRel) {
            self.shared.bell.signal();
        }
        match next {
            Some(next) => {
                *frame = next;
                true
            }
            None => false,
        }
    }

    fn mtu(&self) -> u16 {
        MTU
    }
}

impl Drop for UserNetPort {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        self.shared.bell.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Driver {
    shared: Arc<Shared>,
    nat: Nat<Linux>,
    epoll: rustix::fd::OwnedFd,
    /// Forwarded ports where something waits.
    pending: Vec<bool>,
}

impl Driver {
    fn run(mut self) {
        let origin = std::time::Instant::now();
        let now = || Instant::from_micros(origin.elapsed().as_micros().min(i64::MAX as u128) as i64);
        let mut events = Vec::with_capacity(256);
        let mut next = Some(now());
        while !self.shared.ending.load(Ordering::Acquire) {
            let timeout = next.map(|at| {
                let left = (at - now().min(at)).total_micros();
                Timespec { tv_sec: (left / 1_000_000) as i64, tv_nsec: (left % 1_000_000 * 1000) as i64 }
            });
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return, // Our own valid descriptor: nothing sensible is left to do.
            }
            for event in &events {
                let (flags, token) = (event.flags, event.data.u64());
                self.host_event(token, flags);
            }
            next = self.turn(now());
        }
    }

    fn host_event(&mut self, token: u64, flags: EventFlags) {
        if token == WAKE_TOKEN {
            self.shared.bell.clear();
        } else if token >= FORWARD_TOKEN {
            if let Some(pending) = self.pending.get_mut((token - FORWARD_TOKEN) as usize) {
                *pending = true;
            }
        } else {
            let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
            let readable = gone || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
            let writable = gone || flags.contains(EventFlags::OUT);
            self.nat.host_ready(FlowId(token), readable, writable);
        }
    }

    /// One turn of the wheel: what the guest sent, what waits at the ports, what flows have to do.
    fn turn(&mut self, now: Instant) -> Option<Instant> {
        self.nat.link.set_waiting_outside(lock(&self.shared.to_guest).len());
        let mut queue = lock(&self.shared.from_guest);
        let frames = std::mem::take(&mut queue.frames);
        let refused = std::mem::take(&mut queue.refused);
        drop(queue);
        if refused {
            (self.shared.wake)();
        }
        for frame in frames {
            self.nat.guest_frame(&frame, now);
        }
        for (index, pending) in self.pending.iter_mut().enumerate() {
            if *pending {
                *pending = self.nat.forward_ready(index, now);
            }
        }
        let next = self.nat.service(now);
        let was_full = !self.nat.link.has_room();
        self.hand_over();
        // The guest may have taken frames meanwhile, before it could know that we wait for that.
        let more = self.nat.link.has_room() && (was_full || self.pending.contains(&true));
        if more { Some(now) } else { next }
    }

    /// Gives the frames that are ready to the guest.
    fn hand_over(&mut self) {
        // Said first: a guest that takes a frame after this rings the bell, before this it is counted below.
        self.shared.throttled.store(!self.nat.link.has_room(), Ordering::Release);
        let mut queue = lock(&self.shared.to_guest);
        let was_empty = queue.is_empty();
        while let Some(frame) = self.nat.link.take() {
            queue.push_back(frame);
        }
        let fresh = was_empty && !queue.is_empty();
        self.nat.link.set_waiting_outside(queue.len());
        drop(queue);
        if fresh {
            (self.shared.wake)();
        }
    }
}
