//! Descriptor chains: walked once, completely checked, when they are popped (VIRTIO 1.2, 2.7.5).

use super::{Buffer, ChainReader, ChainWriter, QueueLayout};
use alloc::vec::Vec;
use guest_memory::DmaSpace;

/// Most descriptors of a chain, direct and indirect together. The protocol allows as many as the queue has;
/// some drivers exceed that with indirect tables on small queues, and real devices let them.
pub const MAX_CHAIN: u32 = 1024;

const DESCRIPTOR_BYTES: u64 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A chain that breaks the protocol.
pub(super) struct Malformed;

/// A request's buffers: first those that the device reads, then those that it writes. All lie in RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub(super) head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl Chain {
    /// Number of its first descriptor: its name to the driver.
    pub fn head(&self) -> u16 {
        self.head
    }
    /// Buffers to read from.
    pub fn readable(&self) -> &[Buffer] {
        &self.readable
    }
    /// Buffers to write to.
    pub fn writable(&self) -> &[Buffer] {
        &self.writable
    }
    /// Reads from it.
    pub fn reader<'a>(&'a self, dma: &'a DmaSpace) -> ChainReader<'a> {
        ChainReader::new(dma.ram(), &self.readable)
    }
    /// Writes to it.
    pub fn writer<'a>(&'a self, dma: &'a DmaSpace) -> ChainWriter<'a> {
        ChainWriter::new(dma.ram(), &self.writable)
    }
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn read_descriptor(dma: &DmaSpace, table: u64, index: u32) -> Result<Descriptor, Malformed> {
    let at = table.checked_add(DESCRIPTOR_BYTES * u64::from(index)).ok_or(Malformed)?;
    let mut raw = [0; DESCRIPTOR_BYTES as usize];
    dma.read(at, &mut raw).map_err(|_| Malformed)?;
    Ok(Descriptor {
        address: device::read_le(&raw[..8]),
        len: device::read_le(&raw[8..12]) as u32,
        flags: device::read_le(&raw[12..14]) as u16,
        next: device::read_le(&raw[14..]) as u16,
    })
}

/// Walks the chain at `head`. Bounded by [`MAX_CHAIN`], so a loop is an error.
pub(super) fn walk(
    dma: &DmaSpace,
    layout: &QueueLayout,
    head: u16,
    indirect: bool,
) -> Result<Chain, Malformed> {
    let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
    let mut total = 0u64;
    let (mut table, mut entries, mut index) = (layout.descriptors, u32::from(layout.size), u32::from(head));
    let mut inside = false;
    for _ in 0..MAX_CHAIN {
        if index >= entries {
            return Err(Malformed);
        }
        let d = read_descriptor(dma, table, index)?;
        if d.flags & INDIRECT != 0 {
            let whole = d.len != 0 && u64::from(d.len).is_multiple_of(DESCRIPTOR_BYTES);
            if !indirect || inside || d.flags & NEXT != 0 || !whole {
                return Err(Malformed);
            }
            (table, entries, index) = (d.address, d.len / DESCRIPTOR_BYTES as u32, 0);
            inside = true;
            continue;
        }
        add(&mut chain, dma, &d)?;
        total += u64::from(d.len);
        if total > u64::from(u32::MAX) {
            return Err(Malformed);
        }
        if d.flags & NEXT == 0 {
            return Ok(chain);
        }
        index = u32::from(d.next);
    }
    Err(Malformed)
}

fn add(chain: &mut Chain, dma: &DmaSpace, d: &Descriptor) -> Result<(), Malformed> {
    let writable = d.flags & WRITE != 0;
    if !writable && !chain.writable.is_empty() {
        // Everything to read comes before everything to write.
        return Err(Malformed);
    }
    if d.len == 0 {
        return Ok(());
    }
    let offset = dma.offset(d.address, u64::from(d.len)).map_err(|_| Malformed)?;
    let list = if writable { &mut chain.writable } else { &mut chain.readable };
    list.push(Buffer { offset, len: d.len });
    Ok(())
}
