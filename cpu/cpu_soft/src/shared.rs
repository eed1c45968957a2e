//! What the vCPUs of a partition share: RAM, clock, CPU model, the mailboxes that others reach them by.
//!
//! Self- and cross-modifying code. A page with cached code is tracked ([`Track::Code`]) and no vCPU has a
//! write tag for it. [`Shared::protect_code`] makes that so before the bytes are read: it posts a
//! revocation to every running vCPU and waits until it is taken. Who finds a page tracked waits, too, while
//! somebody else is at it. A write to a tracked page ends the tracking and posts an invalidation to all;
//! they take it before their next block and before any interrupt, but never between `protect_code` and the
//! entry of the code into their cache: so it is not lost on code that was not there yet. Pages that are written
//! all the time are not tracked: see `mixed.rs`.
//!
//! LOCK across two pages. No host instruction does it, so it is done while all other vCPUs stand still
//! ([`Shared::alone`]): outside of `run`, where they take notices, or waiting to be alone themselves.

use crate::mixed::Mixed;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use apic::{ApicInbox, Message};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use guest_memory::{GuestRam, Track, WriteListener};
use guest_time::GuestClock;
use hypervisor::{CpuModel, Kick, Wake};
use sync::{Mutex, Once};

/// Bits of [`VcpuShared::attention`].
pub mod attention {
    /// Something may be deliverable: the inbox, a priority change, an interrupt window.
    pub const IRQ: u32 = 1 << 0;
    /// `run` shall return.
    pub const STOP: u32 = 1 << 1;
    /// Code pages: see the mailbox.
    pub const CODE: u32 = 1 << 2;
    /// A maskable interrupt waits for RFLAGS.IF. Set and cleared by the vCPU itself.
    pub const WINDOW: u32 = 1 << 3;
}

/// What is posted about a page of code.
#[derive(Clone, Copy, Debug)]
pub enum CodeNotice {
    /// Somebody caches code of it: drop write tags.
    RevokeWrite(u64),
    /// It was written: drop cached code.
    Invalidate(u64),
    /// More than was worth keeping: drop all cached code and all write tags.
    Everything,
}

/// How it is noticed that code changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Its page is tracked.
    Tracked,
    /// It has to check itself each time it is entered.
    Itself,
}

/// Notices kept for a vCPU that does not take them (it is halted).
const MAX_NOTICES: usize = 256;
/// Times a page is protected anew because it was written meanwhile.
const MAX_ATTEMPTS: u32 = 4;

/// One vCPU as others see it.
pub struct VcpuShared {
    /// Checked at the end of every block.
    pub attention: AtomicU32,
    /// Posted interrupts.
    pub inbox: Arc<ApicInbox>,
    /// Executing guest code (between entry and return of `run`).
    running: AtomicBool,
    notices: Mutex<Vec<CodeNotice>>,
    posted: AtomicU64,
    taken: AtomicU64,
    /// Waits to be alone, in the middle of no access.
    waits: AtomicBool,
    /// Somebody is alone, or about to be.
    stand: Arc<AtomicBool>,
    /// Instructions executed, as of the last look at the clock.
    pub instructions: AtomicU64,
    /// Guest time spent executing, as of the last look at the clock.
    pub busy_ns: AtomicU64,
    waker: Once<Arc<dyn Wake>>,
}

impl VcpuShared {
    fn new(id: u32, stand: Arc<AtomicBool>) -> Self {
        Self {
            attention: AtomicU32::new(0),
            inbox: Arc::new(ApicInbox::new(id)),
            running: AtomicBool::new(false),
            notices: Mutex::new(Vec::new()),
            posted: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            waits: AtomicBool::new(false),
            stand,
            instructions: AtomicU64::new(0),
            busy_ns: AtomicU64::new(0),
            waker: Once::new(),
        }
    }

    /// Says who wakes its thread. `false` if that was said before.
    pub fn set_waker(&self, waker: Arc<dyn Wake>) -> bool {
        let mut first = false;
        self.waker.call_once(|| {
            first = true;
            waker
        });
        first
    }

    /// Raises attention and wakes it if it is halted.
    pub fn signal(&self, bits: u32) {
        self.attention.fetch_or(bits, SeqCst);
        match self.waker.get() {
            Some(waker) if self.running.load(SeqCst) => waker.interrupt(),
            Some(waker) => waker.wake(),
            None => {}
        }
    }

    /// It starts to execute; what was posted before is still to be taken.
    pub fn enter(&self) {
        self.running.store(true, SeqCst);
    }
    /// It does not execute any more: nobody waits for it.
    pub fn leave(&self) {
        self.running.store(false, SeqCst);
    }

    /// Posts a notice; the number that `taken` reaches when it was taken.
    fn post(&self, notice: CodeNotice) -> u64 {
        let mut notices = self.notices.lock();
        if notices.len() >= MAX_NOTICES {
            notices.clear();
            notices.push(CodeNotice::Everything);
        }
        notices.push(notice);
        let number = self.ask_for_a_look();
        drop(notices);
        number
    }

    /// Makes it take notices soon; the number that `taken` reaches then.
    fn ask_for_a_look(&self) -> u64 {
        let number = self.posted.fetch_add(1, SeqCst) + 1;
        self.attention.fetch_or(attention::CODE, SeqCst);
        if let Some(waker) = self.waker.get().filter(|_| self.running.load(SeqCst)) {
            waker.interrupt();
        }
        number
    }

    /// Takes all notices and hands them to `apply`, then acknowledges them; and stands still while somebody is alone.
    pub fn take_notices(&self, mut apply: impl FnMut(CodeNotice)) {
        let mut spins = 0;
        loop {
            self.attention.fetch_and(!attention::CODE, SeqCst);
            let (notices, upto) = {
                let mut guard = self.notices.lock();
                (core::mem::take(&mut *guard), self.posted.load(SeqCst))
            };
            notices.into_iter().for_each(&mut apply);
            self.taken.fetch_max(upto, SeqCst);
            if !self.stand.load(SeqCst) {
                return;
            }
            wait_a_little(&mut spins);
        }
    }

    fn has_taken(&self, number: u64) -> bool {
        self.taken.load(SeqCst) >= number || !self.running.load(SeqCst)
    }
}

impl Kick for VcpuShared {
    fn kick(&self) {
        self.signal(attention::STOP);
    }
}

/// See the module's header.
pub struct Shared {
    /// Guest RAM.
    pub ram: GuestRam,
    /// All guest time.
    pub clock: GuestClock,
    /// TSC frequency.
    pub tsc_khz: u32,
    /// What CPUID says.
    pub model: CpuModel,
    /// All vCPUs by number.
    pub vcpus: Box<[Arc<VcpuShared>]>,
    /// Their inboxes, as message routing wants them.
    pub inboxes: Box<[Arc<ApicInbox>]>,
    /// Held by who is alone.
    alone: Mutex<()>,
    /// See [`VcpuShared::stand`].
    stand: Arc<AtomicBool>,
    /// Pages that are tracked, but for which some vCPU may still have a write tag.
    under_way: Mutex<Vec<u64>>,
    /// Pages whose code checks itself. Taken inside of `under_way`, if both are.
    mixed: Mutex<Mixed>,
}

impl Shared {
    /// For a partition of `layout`.
    pub fn new(layout: &hypervisor::PartitionLayout) -> Arc<Self> {
        let shared = Self::without_listener(layout);
        shared.ram.set_listener(Arc::new(CodeListener(Arc::downgrade(&shared))));
        shared
    }

    /// As `new`, for vCPUs that keep no code: they need not hear of DMA.
    pub fn without_listener(layout: &hypervisor::PartitionLayout) -> Arc<Self> {
        let stand = Arc::new(AtomicBool::new(false));
        let vcpus: Box<[_]> =
            (0..layout.vcpus).map(|id| Arc::new(VcpuShared::new(id, stand.clone()))).collect();
        let inboxes = vcpus.iter().map(|v| v.inbox.clone()).collect();
        Arc::new(Self {
            ram: layout.ram.clone(),
            clock: layout.clock.clone(),
            tsc_khz: layout.tsc_khz,
            model: layout.cpu_model.clone(),
            vcpus,
            inboxes,
            alone: Mutex::new(()),
            stand,
            under_way: Mutex::new(Vec::new()),
            mixed: Mutex::new(Mixed::new()),
        })
    }

    /// Sends an interrupt message of the chipset or a device.
    pub fn deliver(&self, message: &Message) {
        apic::route::deliver(message, &self.inboxes, |n| self.vcpus[n].signal(attention::IRQ));
    }

    /// Runs `access` of vCPU `me` while no other vCPU is in the middle of one.
    pub fn alone<R>(&self, me: usize, access: impl FnOnce() -> R) -> R {
        let own = &self.vcpus[me];
        own.waits.store(true, SeqCst);
        let _turn = self.alone.lock();
        own.waits.store(false, SeqCst);
        self.stand.store(true, SeqCst);
        for vcpu in self.vcpus.iter().enumerate().filter(|(n, _)| *n != me).map(|(_, vcpu)| vcpu) {
            let number = vcpu.ask_for_a_look();
            let mut spins = 0;
            while !vcpu.has_taken(number) && !vcpu.waits.load(SeqCst) {
                wait_a_little(&mut spins);
            }
        }
        let result = access();
        self.stand.store(false, SeqCst);
        result
    }

    /// Page `page` of the span was written: all drop what they cached of it. `by`: the writing vCPU, which
    /// does so itself.
    pub fn code_written(&self, page: u64, by: Option<usize>) {
        if !self.ram.untrack(page, Track::Code) {
            return;
        }
        self.mixed.lock().written(page, self.clock.now());
        for (n, vcpu) in self.vcpus.iter().enumerate() {
            if Some(n) != by {
                vcpu.post(CodeNotice::Invalidate(page));
            }
        }
    }

    /// Before code of `page` is read into the cache of vCPU `me`: nobody writes it unseen from now on.
    /// `serve_own` takes the caller's own notices, so that two vCPUs cannot wait for each other; it is told
    /// whether the caller's own write tags for the page must go. Nothing of that if the page is written all the time.
    pub fn protect_code(&self, page: u64, me: usize, mut serve_own: impl FnMut(bool)) -> Watch {
        let mut attempts = 0;
        let mut spins = 0u32;
        loop {
            if self.checks_itself(page) {
                return Watch::Itself;
            }
            let mut under_way = self.under_way.lock();
            if self.ram.track(page, Track::Code) {
                // Written since the last turn.
                attempts += 1;
                if attempts > MAX_ATTEMPTS {
                    self.ram.untrack(page, Track::Code);
                    self.mixed.lock().add(page, self.clock.now());
                    return Watch::Itself;
                }
                under_way.push(page);
                drop(under_way);
                self.revoke_write(page, me, &mut serve_own);
                let mut under_way = self.under_way.lock();
                if let Some(n) = under_way.iter().position(|p| *p == page) {
                    under_way.swap_remove(n);
                }
            } else if under_way.contains(&page) {
                drop(under_way);
                serve_own(false);
                wait_a_little(&mut spins);
            } else {
                return Watch::Tracked;
            }
        }
    }

    /// Whether code of `page` has to check itself. Pages that did so for long are given up on the way: their blocks
    /// go, or they would never be as others.
    fn checks_itself(&self, page: u64) -> bool {
        let mut mixed = self.mixed.lock();
        if mixed.is_empty() {
            return false;
        }
        while let Some(old) = mixed.expired(self.clock.now()) {
            for vcpu in &self.vcpus {
                vcpu.post(CodeNotice::Invalidate(old));
            }
        }
        mixed.contains(page)
    }

    /// Makes all vCPUs drop their write tags for `page`, and waits until they have.
    fn revoke_write(&self, page: u64, me: usize, serve_own: &mut impl FnMut(bool)) {
        serve_own(true);
        for (n, vcpu) in self.vcpus.iter().enumerate() {
            if n == me {
                continue;
            }
            let number = vcpu.post(CodeNotice::RevokeWrite(page));
            let mut spins = 0;
            while !vcpu.has_taken(number) {
                serve_own(false);
                wait_a_little(&mut spins);
            }
        }
    }
}

fn wait_a_little(spins: &mut u32) {
    *spins += 1;
    if spins.is_multiple_of(64) {
        sync::relax();
    } else {
        core::hint::spin_loop();
    }
}

/// Hears of DMA into pages with cached code.
struct CodeListener(alloc::sync::Weak<Shared>);

impl WriteListener for CodeListener {
    fn page_written(&self, page: u64, tracks: u8) {
        if let Some(shared) = self.0.upgrade().filter(|_| tracks & Track::Code as u8 != 0) {
            shared.code_written(page, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_for_a_halted_vcpu_stay_few() {
        let (_, clock) = guest_time::manual::ManualTime::clock();
        let layout = hypervisor::PartitionLayout {
            ram: GuestRam::for_test(0x10_0000),
            vcpus: 2,
            cpu_model: CpuModel::max(),
            tsc_khz: 1_000_000,
            clock,
        };
        let shared = Shared::new(&layout);
        for n in 0..100_000 {
            assert_eq!(shared.protect_code(n % 256, 0, |_| {}), Watch::Tracked);
            shared.code_written(n % 256, Some(0));
        }
        let halted = &shared.vcpus[1];
        assert!(halted.notices.lock().len() <= MAX_NOTICES + 1);
        let mut all = 0;
        halted.take_notices(|notice| all += u32::from(matches!(notice, CodeNotice::Everything)));
        assert_eq!(all, 1);
        assert!(halted.has_taken(200_000));
    }
}
