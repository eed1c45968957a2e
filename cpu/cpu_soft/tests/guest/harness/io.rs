//! The machine as the vCPU sees it: records what comes, answers what a test told it to.

use super::layout::PORT_DONE;
use hypervisor::{Gpa, Kicker, VcpuIo};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

/// One access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    In { port: u16, bytes: usize },
    Out { port: u16, value: u32, bytes: usize },
    Read { gpa: u64, bytes: usize },
    Write { gpa: u64, value: u64, bytes: usize },
    Eoi(u8),
    PicAck,
}

type OnOut = Box<dyn Fn(u16, u32) + Send + Sync>;

/// See the module's header.
#[derive(Default)]
pub struct Recorder {
    events: Mutex<Vec<Event>>,
    /// What IN and device reads give, repeated in every byte.
    pub answer: AtomicU32,
    /// Vectors that the 8259 would give, last first.
    pub pic: Mutex<Vec<u8>>,
    on_out: Mutex<Option<OnOut>>,
    done: AtomicBool,
    kickers: Mutex<Vec<Kicker>>,
}

impl Recorder {
    pub fn add_kicker(&self, kicker: Kicker) {
        self.kickers.lock().unwrap().push(kicker);
    }
    /// Called for every OUT, in the vCPU's thread.
    pub fn on_out(&self, f: impl Fn(u16, u32) + Send + Sync + 'static) {
        *self.on_out.lock().unwrap() = Some(Box::new(f));
    }
    /// Whether the guest wrote to the port that ends the test.
    pub fn done(&self) -> bool {
        self.done.load(SeqCst)
    }
    pub fn finish(&self) {
        self.done.store(true, SeqCst);
        self.kickers.lock().unwrap().iter().for_each(Kicker::kick);
    }
    /// What was recorded since the last call.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap())
    }
    /// Values written to `port`.
    pub fn outs(&self, port: u16) -> Vec<u32> {
        let events = self.events.lock().unwrap();
        let value = |e: &Event| match e {
            Event::Out { port: p, value, .. } if *p == port => Some(*value),
            _ => None,
        };
        events.iter().filter_map(value).collect()
    }
    /// Vectors whose EOI was reported.
    pub fn eois(&self) -> Vec<u8> {
        let events = self.events.lock().unwrap();
        events.iter().filter_map(|e| if let Event::Eoi(v) = e { Some(*v) } else { None }).collect()
    }
    fn push(&self, event: Event) {
        let mut events = self.events.lock().unwrap();
        // Hostile guests may do nothing else.
        if events.len() < 100_000 {
            events.push(event);
        }
    }
}

impl VcpuIo for Recorder {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.push(Event::In { port, bytes: data.len() });
        data.fill(self.answer.load(SeqCst) as u8);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        let value = data.iter().rev().fold(0, |v, b| v << 8 | u32::from(*b));
        self.push(Event::Out { port, value, bytes: data.len() });
        if port == PORT_DONE {
            self.finish();
        }
        if let Some(f) = &*self.on_out.lock().unwrap() {
            f(port, value);
        }
    }
    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        self.push(Event::Read { gpa: at.0, bytes: data.len() });
        data.fill(self.answer.load(SeqCst) as u8);
    }
    fn mmio_write(&self, at: Gpa, data: &[u8]) {
        let value = data.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
        self.push(Event::Write { gpa: at.0, value, bytes: data.len() });
    }
    fn pic_ack(&self) -> Option<u8> {
        self.push(Event::PicAck);
        self.pic.lock().unwrap().pop()
    }
    fn eoi(&self, vector: u8) {
        self.push(Event::Eoi(vector));
    }
}
