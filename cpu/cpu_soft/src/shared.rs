//! What the vCPUs of a partition share: RAM, clock, CPU model, the mailboxes that others reach them by.
//!
//! Self- and cross-modifying code. A page with cached code is tracked ([`Track::Code`]) and no vCPU has a
//! write tag for it. [`Shared::protect_code`] makes that so before the bytes are read: it posts a
//! revocation to every running vCPU and waits until it is taken. A write to a tracked page ends the
//! tracking and posts an invalidation to all; they take it before their next block and before any
//! interrupt.

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
}

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
    waker: Once<Arc<dyn Wake>>,
}

impl VcpuShared {
    fn new(id: u32) -> Self {
        Self {
            attention: AtomicU32::new(0),
            inbox: Arc::new(ApicInbox::new(id)),
            running: AtomicBool::new(false),
            notices: Mutex::new(Vec::new()),
            posted: AtomicU64::new(0),
            taken: AtomicU64::new(0),
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
        if let Some(waker) = self.waker.get().filter(|_| !self.running.load(SeqCst)) {
            waker.wake();
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
        notices.push(notice);
        let number = self.posted.fetch_add(1, SeqCst) + 1;
        drop(notices);
        self.attention.fetch_or(attention::CODE, SeqCst);
        number
    }

    /// Takes all notices and hands them to `apply`, then acknowledges them.
    pub fn take_notices(&self, mut apply: impl FnMut(CodeNotice)) {
        self.attention.fetch_and(!attention::CODE, SeqCst);
        let (notices, upto) = {
            let mut guard = self.notices.lock();
            (core::mem::take(&mut *guard), self.posted.load(SeqCst))
        };
        notices.into_iter().for_each(&mut apply);
        self.taken.fetch_max(upto, SeqCst);
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
    /// Held for LOCK accesses that cross a page.
    pub split_lock: Mutex<()>,
}

impl Shared {
    /// For a partition of `layout`.
    pub fn new(layout: &hypervisor::PartitionLayout) -> Arc<Self> {
        let vcpus: Box<[_]> = (0..layout.vcpus).map(|id| Arc::new(VcpuShared::new(id))).collect();
        let inboxes = vcpus.iter().map(|v| v.inbox.clone()).collect();
        let shared = Arc::new(Self {
            ram: layout.ram.clone(),
            clock: layout.clock.clone(),
            tsc_khz: layout.tsc_khz,
            model: layout.cpu_model.clone(),
            vcpus,
            inboxes,
            split_lock: Mutex::new(()),
        });
        shared.ram.set_listener(Box::new(CodeListener(Arc::downgrade(&shared))));
        shared
    }

    /// Sends an interrupt message of the chipset or a device.
    pub fn deliver(&self, message: &Message) {
        apic::route::deliver(message, &self.inboxes, |n| self.vcpus[n].signal(attention::IRQ));
    }

    /// Page `page` of the span was written: all drop what they cached of it. `by`: the writing vCPU, which
    /// does so itself.
    pub fn code_written(&self, page: u64, by: Option<usize>) {
        if !self.ram.untrack(page, Track::Code) {
            return;
        }
        for (n, vcpu) in self.vcpus.iter().enumerate() {
            if Some(n) != by {
                vcpu.post(CodeNotice::Invalidate(page));
            }
        }
    }

    /// Before code of `page` is read into a cache of vCPU `me`: nobody writes it unseen from now on.
    /// `serve_own` takes the caller's own notices, so that two vCPUs cannot wait for each other. Returns
    /// whether the page was not protected before: the caller drops its own write tags then.
    pub fn protect_code(&self, page: u64, me: usize, mut serve_own: impl FnMut()) -> bool {
        if !self.ram.track(page, Track::Code) {
            return false;
        }
        for (n, vcpu) in self.vcpus.iter().enumerate() {
            if n == me {
                continue;
            }
            let number = vcpu.post(CodeNotice::RevokeWrite(page));
            let mut spins = 0u32;
            while !vcpu.has_taken(number) {
                serve_own();
                spins += 1;
                if spins.is_multiple_of(64) {
                    sync::relax();
                } else {
                    core::hint::spin_loop();
                }
            }
        }
        true
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
