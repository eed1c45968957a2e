//! The host's ends of a test machine's devices: a disk, a network, a console and serial ports in memory, as unwilling
//! as a test wants them ([`Mood`]).

use crate::host::SerialInput;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use chipset::SerialOut;
use device::Waker;
use guest_memory::DmaSpace;
use sync::Mutex;
use virtio_devices::{
    BlockBackend, BlockInfo, BlockOp, BlockRequest, Busy, Completion, ConsoleBackend, EntropySource,
    NetBackend,
};

/// Bytes of the test disk.
pub const DISK_BYTES: usize = 1 << 20;
/// Most frames and bytes that are kept in any direction.
const MAX_KEPT: usize = 1 << 16;

/// How willing the host is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mood {
    /// Nothing is taken: not by the disk, the network, the console nor the serial ports.
    pub busy: bool,
    /// Disk requests are done, but nobody is told.
    pub late: bool,
}

#[derive(Default)]
struct Shared {
    mood: Mood,
    /// Of each end by its name: who asked last.
    wakers: BTreeMap<String, Waker>,
    serial: Vec<u8>,
    input: Option<SerialInput>,
    disk: Vec<u8>,
    completed: VecDeque<Completion>,
    frames: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    typed: VecDeque<u8>,
}

/// See the module's header. Clones are the same ends.
#[derive(Clone)]
pub struct Ends(Arc<Mutex<Shared>>);

impl Default for Ends {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Shared { disk: vec![0; DISK_BYTES], ..Shared::default() })))
    }
}

impl Ends {
    /// How many hold these ends: one for each device and the ground itself.
    pub fn holders(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// The same disk and mood, with nobody at the other side yet.
    pub(super) fn again(&self) -> Self {
        let old = self.0.lock();
        Self(Arc::new(Mutex::new(Shared { mood: old.mood, disk: old.disk.clone(), ..Shared::default() })))
    }

    /// Changes the mood; whoever waited for a better one is woken.
    pub fn set_mood(&self, mood: Mood) {
        self.0.lock().mood = mood;
        self.wake();
    }
    /// A frame comes from the network.
    pub fn arrive(&self, frame: Vec<u8>) {
        let mut shared = self.0.lock();
        if shared.frames.len() < MAX_KEPT {
            shared.frames.push_back(frame);
        }
        drop(shared);
        self.wake();
    }
    /// Frames that the guest sent since the last call.
    pub fn take_sent(&self) -> Vec<Vec<u8>> {
        core::mem::take(&mut self.0.lock().sent)
    }
    /// Types at the virtio console.
    pub fn type_at_console(&self, text: &[u8]) {
        let mut shared = self.0.lock();
        let room = MAX_KEPT.saturating_sub(shared.typed.len());
        shared.typed.extend(text.iter().take(room));
        drop(shared);
        self.wake();
    }
    /// Types at the first serial port; returns how many bytes it took.
    pub(super) fn type_text(&self, text: &[u8]) -> usize {
        let input = self.0.lock().input.clone();
        input.map_or(0, |input| input.receive(text))
    }
    /// What the guest wrote to its serial ports.
    pub(super) fn serial_output(&self) -> Vec<u8> {
        self.0.lock().serial.clone()
    }

    fn wake(&self) {
        let wakers = self.0.lock().wakers.clone();
        wakers.values().for_each(Waker::wake);
    }
    fn set_waker(&self, end: &str, waker: Waker) {
        self.0.lock().wakers.insert(end.into(), waker);
    }
}

pub(super) struct SerialLog(Ends);

impl SerialLog {
    /// The port called `end`; without a name it has no input.
    pub fn open(ends: &Ends, end: Option<&str>, input: SerialInput, waker: Waker) -> Self {
        ends.set_waker(end.unwrap_or("unnamed serial port"), waker);
        if end.is_some() {
            ends.0.lock().input = Some(input);
        }
        Self(ends.clone())
    }
}

impl SerialOut for SerialLog {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut shared = self.0.0.lock();
        if shared.mood.busy {
            return 0;
        }
        if shared.serial.len() < MAX_KEPT {
            shared.serial.extend_from_slice(bytes);
        }
        bytes.len()
    }
    fn input_room(&mut self) {}
}

pub(super) struct Console {
    pub name: String,
    pub ends: Ends,
}

impl ConsoleBackend for Console {
    fn set_waker(&mut self, waker: Waker) {
        self.ends.set_waker(&self.name, waker);
    }
    fn write(&mut self, data: &[u8]) -> usize {
        if self.ends.0.lock().mood.busy { 0 } else { data.len() }
    }
    fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut shared = self.ends.0.lock();
        let n = buf.len().min(shared.typed.len());
        buf.iter_mut().zip(shared.typed.drain(..n)).for_each(|(to, from)| *to = from);
        n
    }
}

pub(super) struct Network {
    pub name: String,
    pub ends: Ends,
}

impl NetBackend for Network {
    fn set_waker(&mut self, waker: Waker) {
        self.ends.set_waker(&self.name, waker);
    }
    fn send(&mut self, frame: &[u8]) -> Result<(), Busy> {
        let mut shared = self.ends.0.lock();
        if shared.mood.busy {
            return Err(Busy);
        }
        if shared.sent.len() < MAX_KEPT {
            shared.sent.push(frame.to_vec());
        }
        Ok(())
    }
    fn receive(&mut self, buf: &mut [u8]) -> Option<usize> {
        let frame = self.ends.0.lock().frames.pop_front()?;
        let n = frame.len().min(buf.len());
        buf[..n].copy_from_slice(&frame[..n]);
        Some(n)
    }
}

pub(super) struct Entropy;

impl EntropySource for Entropy {
    fn fill(&mut self, buf: &mut [u8]) {
        buf.fill(0x5A);
    }
}

pub(super) struct MemoryDisk {
    name: String,
    ends: Ends,
    waker: Option<Waker>,
}

impl MemoryDisk {
    pub fn new(name: String, ends: Ends) -> Self {
        Self { name, ends, waker: None }
    }
}

impl BlockBackend for MemoryDisk {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            bytes: DISK_BYTES as u64,
            read_only: false,
            block_bytes: 512,
            physical_block_bytes: 4096,
            discard: true,
            write_zeroes: true,
        }
    }
    fn set_waker(&mut self, waker: Waker) {
        self.ends.set_waker(&self.name, waker.clone());
        self.waker = Some(waker);
    }
    fn submit(&mut self, request: BlockRequest, mem: &DmaSpace) -> Result<(), Busy> {
        let mut shared = self.ends.0.lock();
        if shared.mood.busy {
            return Err(Busy);
        }
        let disk = &mut shared.disk;
        match request.op {
            BlockOp::Read { offset } | BlockOp::Write { offset } => {
                let mut at = offset as usize;
                for buffer in request.buffers.iter() {
                    let part = &mut disk[at..at + buffer.len as usize];
                    match request.op {
                        BlockOp::Read { .. } => mem.ram().store_bytes(buffer.offset, part),
                        _ => mem.ram().load_bytes(buffer.offset, part),
                    }
                    at += buffer.len as usize;
                }
            }
            BlockOp::WriteZeroes { offset, bytes, .. } | BlockOp::Discard { offset, bytes } => {
                disk[offset as usize..(offset + bytes) as usize].fill(0);
            }
            BlockOp::Flush => {}
        }
        shared.completed.push_back(Completion { id: request.id, result: Ok(()) });
        drop(shared);
        if let Some(waker) = &self.waker {
            waker.wake();
        }
        Ok(())
    }
    fn next_completion(&mut self) -> Option<Completion> {
        let mut shared = self.ends.0.lock();
        if shared.mood.late { None } else { shared.completed.pop_front() }
    }
}
