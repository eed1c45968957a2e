//! The block worker pool against stores in memory.
#![allow(missing_docs)]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use guest_memory::{DmaSpace, GuestRam};
use host_io::block_pool::{BlockError, BlockOp, BlockPool, BlockRequest, GuestSpans, IoBuffer, PoolConfig};
use host_io::block_store::{BlockStore, check_range};

struct Memory {
    bytes: Mutex<Vec<u8>>,
    flushes: AtomicU64,
    /// Each operation takes one permit first.
    gate: Option<Mutex<Receiver<()>>>,
}

fn memory(bytes: usize) -> Arc<Memory> {
    Arc::new(Memory { bytes: Mutex::new(vec![0; bytes]), flushes: AtomicU64::new(0), gate: None })
}

fn gated(bytes: usize) -> (Arc<Memory>, Sender<()>) {
    let (sender, gate) = channel();
    let store = Memory { gate: Some(Mutex::new(gate)), ..Arc::into_inner(memory(bytes)).unwrap() };
    (Arc::new(store), sender)
}

impl Memory {
    fn pass(&self) {
        if let Some(gate) = &self.gate {
            let _ = gate.lock().unwrap().recv();
        }
    }
}

impl BlockStore for Memory {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.pass();
        buf.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.pass();
        self.bytes.lock().unwrap()[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.pass();
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        check_range(offset, len, self.size_bytes())?;
        self.write_at(&vec![0; len as usize], offset)
    }
}

type Pool<B> = BlockPool<u64, B>;

fn start<B: IoBuffer>(store: Arc<dyn BlockStore>, config: PoolConfig) -> (Pool<B>, Receiver<()>) {
    let (woken, wakes) = channel();
    let wake = Box::new(move || _ = woken.send(()));
    (BlockPool::start(store, config, wake).unwrap(), wakes)
}

#[test]
fn many_requests_complete_exactly_once() {
    let store = memory(8 << 20);
    let (pool, wakes) = start::<Vec<u8>>(store.clone(), PoolConfig { workers: 3, depth: 16 });
    let mut left: Vec<u64> = (0..400).rev().collect();
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 400 {
        while let Some(token) = left.pop() {
            let buffer = vec![token as u8; 8192];
            let request = BlockRequest { token, op: BlockOp::Write { offset: token * 8192 }, buffer };
            if let Err(request) = pool.submit(request) {
                left.push(request.token);
                break;
            }
        }
        let Some(done) = pool.next_completion() else {
            wakes.recv().unwrap();
            continue;
        };
        done.result.unwrap();
        assert!(seen.insert(done.token));
    }
    let bytes = store.bytes.lock().unwrap();
    assert!((0..400usize).all(|t| bytes[t * 8192..][..8192].iter().all(|&b| b == t as u8)));
    assert_eq!(pool.in_flight(), 0);
}

#[test]
fn a_full_pool_gives_the_request_back() {
    let (store, gate) = gated(4096);
    let (pool, wakes) = start::<Vec<u8>>(store, PoolConfig { workers: 1, depth: 2 });
    let flush = |token| BlockRequest { token, op: BlockOp::Flush, buffer: Vec::new() };
    pool.submit(flush(1)).unwrap();
    pool.submit(flush(2)).unwrap();
    assert_eq!(pool.submit(flush(3)).unwrap_err().token, 3);
    gate.send(()).unwrap();
    wakes.recv().unwrap();
    assert_eq!(pool.next_completion().unwrap().token, 1);
    pool.submit(flush(3)).unwrap();
    gate.send(()).unwrap();
    gate.send(()).unwrap();
    pool.wait_idle();
    let tokens: Vec<u64> = std::iter::from_fn(|| pool.next_completion()).map(|c| c.token).collect();
    assert_eq!(tokens, [2, 3]);
}

#[test]
fn guest_memory_is_gathered_and_scattered() {
    let ram = GuestRam::for_test(1 << 20);
    let space = DmaSpace::new(ram);
    space.set_enabled(true);
    let data: Vec<u8> = (0..300_000u32).map(|i| (i % 253) as u8).collect();
    space.write(0x1000, &data[..100_000]).unwrap();
    space.write(0x40000, &data[100_000..]).unwrap();

    let store = memory(1 << 20);
    let (pool, wakes) = start(store.clone(), PoolConfig::default());
    let spans = vec![(0x1000, 100_000), (0x9000, 0), (0x40000, 200_000)];
    let buffer = GuestSpans::new(space.clone(), spans);
    pool.submit(BlockRequest { token: 1, op: BlockOp::Write { offset: 512 }, buffer }).unwrap();
    wakes.recv().unwrap();
    pool.next_completion().unwrap().result.unwrap();
    assert_eq!(store.bytes.lock().unwrap()[512..][..data.len()], data);

    let spans = (0..300u64).map(|i| (0x8_0000 + i * 1001, 1000)).collect();
    let buffer = GuestSpans::new(space.clone(), spans);
    pool.submit(BlockRequest { token: 2, op: BlockOp::Read { offset: 512 }, buffer }).unwrap();
    wakes.recv().unwrap();
    pool.next_completion().unwrap().result.unwrap();
    for (i, chunk) in data.chunks(1000).enumerate() {
        let mut got = vec![0; 1000];
        space.read(0x8_0000 + i as u64 * 1001, &mut got).unwrap();
        assert_eq!(got, chunk);
    }

    // A buffer outside of RAM, or with the bus master bit off, fails the request and nothing else.
    for (spans, enabled) in
        [(vec![(u64::MAX - 10, 512)], true), (vec![(1 << 20, 512)], true), (vec![(0, 512)], false)]
    {
        space.set_enabled(enabled);
        let buffer = GuestSpans::new(space.clone(), spans);
        pool.submit(BlockRequest { token: 3, op: BlockOp::Read { offset: 0 }, buffer }).unwrap();
        wakes.recv().unwrap();
        let failed = pool.next_completion().unwrap().result;
        assert!(matches!(failed, Err(BlockError::Buffer(_))), "{failed:?}");
    }
}

#[test]
fn transfers_outside_the_disk_fail_before_they_change_anything() {
    let store = memory(1 << 20);
    let (pool, wakes) = start::<Vec<u8>>(store.clone(), PoolConfig::default());
    for offset in [(1 << 20) - 511, u64::MAX - 5] {
        let buffer = vec![1; 512];
        pool.submit(BlockRequest { token: 0, op: BlockOp::Write { offset }, buffer }).unwrap();
        wakes.recv().unwrap();
        assert!(matches!(pool.next_completion().unwrap().result, Err(BlockError::Store(_))));
    }
    assert!(store.bytes.lock().unwrap().iter().all(|&b| b == 0));
}

#[test]
fn the_store_is_replaced_between_requests() {
    let (first, gate) = gated(4096);
    let second = memory(4096);
    let (pool, _) = start::<Vec<u8>>(first.clone(), PoolConfig { workers: 2, depth: 8 });
    let write = |v: u8| BlockRequest { token: 0, op: BlockOp::Write { offset: 0 }, buffer: vec![v; 512] };
    pool.submit(write(1)).unwrap();
    gate.send(()).unwrap();
    pool.replace_store(second.clone());
    pool.submit(write(2)).unwrap();
    pool.wait_idle();
    assert_eq!((first.bytes.lock().unwrap()[0], second.bytes.lock().unwrap()[0]), (1, 2));
}

#[test]
fn dropping_the_pool_finishes_what_was_accepted() {
    let store = memory(4096);
    let (pool, _) = start::<Vec<u8>>(store.clone(), PoolConfig { workers: 1, depth: 100 });
    for token in 0..100 {
        pool.submit(BlockRequest { token, op: BlockOp::Flush, buffer: Vec::new() }).unwrap();
    }
    drop(pool);
    assert_eq!(store.flushes.load(Ordering::SeqCst), 100);
}
