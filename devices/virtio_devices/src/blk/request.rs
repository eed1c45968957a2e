//! The format of a disk request: from a chain to an operation with its limits checked (VIRTIO 1.2, 5.2.6).

use crate::backend::{BlockInfo, BlockOp, SECTOR_BYTES};
use alloc::sync::Arc;
use guest_memory::DmaSpace;
use virtio::{Buffer, Chain};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;
const STATUS_BYTES: u64 = 1;
/// Flag of a range: its space may be given back.
const UNMAP: u32 = 1;

/// How a request ended, as the driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a chain asks for.
pub enum Parsed {
    /// Neither header nor a place for the status: the driver broke the protocol.
    Broken,
    /// Answered without the backend.
    Done(Status),
    /// The serial number is to be written.
    Id,
    /// For the backend.
    Backend { op: BlockOp, buffers: Arc<[Buffer]> },
}

/// Bytes that the device may write before the status byte.
pub fn data_in_bytes(chain: &Chain, dma: &DmaSpace) -> Option<u64> {
    chain.writer(dma).remaining().checked_sub(STATUS_BYTES)
}

/// Takes a chain apart.
pub fn parse(chain: &Chain, dma: &DmaSpace, info: &BlockInfo, max_range: u32) -> Parsed {
    let Some(room) = data_in_bytes(chain, dma) else { return Parsed::Broken };
    let mut reader = chain.reader(dma);
    let Some(header) = reader.read_array::<{ HEADER_BYTES as usize }>() else { return Parsed::Broken };
    let (kind, sector) = (device::read_le(&header[..4]) as u32, device::read_le(&header[8..]));
    let none: Arc<[Buffer]> = Arc::new([]);
    match kind {
        IN => match span(sector, room, info) {
            Err(status) => Parsed::Done(status),
            Ok(offset) => {
                let buffers = chain.writer(dma).take(room).into();
                Parsed::Backend { op: BlockOp::Read { offset }, buffers }
            }
        },
        OUT if info.read_only => Parsed::Done(Status::IoError),
        OUT => match span(sector, reader.remaining(), info) {
            Err(status) => Parsed::Done(status),
            Ok(offset) => {
                let buffers = reader.take(reader.remaining()).into();
                Parsed::Backend { op: BlockOp::Write { offset }, buffers }
            }
        },
        FLUSH => Parsed::Backend { op: BlockOp::Flush, buffers: none },
        GET_ID => Parsed::Id,
        DISCARD if info.discard => range(reader, info, max_range, |offset, bytes, flags| {
            (flags == 0).then_some(BlockOp::Discard { offset, bytes })
        }),
        WRITE_ZEROES if info.write_zeroes => range(reader, info, max_range, |offset, bytes, flags| {
            let unmap = flags & UNMAP != 0;
            (flags & !UNMAP == 0).then_some(BlockOp::WriteZeroes { offset, bytes, unmap })
        }),
        _ => Parsed::Done(Status::Unsupported),
    }
}

/// First byte of `bytes` bytes at `sector`, if they lie inside the disk and are whole sectors.
fn span(sector: u64, bytes: u64, info: &BlockInfo) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let end = offset.checked_add(bytes).ok_or(Status::IoError)?;
    let capacity = info.bytes / SECTOR_BYTES * SECTOR_BYTES;
    let fits = bytes != 0 && bytes.is_multiple_of(SECTOR_BYTES) && end <= capacity;
    if fits { Ok(offset) } else { Err(Status::IoError) }
}

/// A request of exactly one range, as the configuration says.
fn range(
    mut reader: virtio::ChainReader<'_>,
    info: &BlockInfo,
    max_sectors: u32,
    op: impl FnOnce(u64, u64, u32) -> Option<BlockOp>,
) -> Parsed {
    if reader.remaining() != RANGE_BYTES {
        return Parsed::Done(Status::Unsupported);
    }
    let Some(raw) = reader.read_array::<{ RANGE_BYTES as usize }>() else { return Parsed::Broken };
    let (sector, sectors) = (device::read_le(&raw[..8]), device::read_le(&raw[8..12]) as u32);
    let flags = device::read_le(&raw[12..]) as u32;
    if sectors > max_sectors {
        return Parsed::Done(Status::IoError);
    }
    let bytes = u64::from(sectors) * SECTOR_BYTES;
    match span(sector, bytes, info) {
        Err(status) => Parsed::Done(status),
        Ok(offset) => match op(offset, bytes, flags) {
            None => Parsed::Done(Status::Unsupported),
            Some(op) => Parsed::Backend { op, buffers: Arc::new([]) },
        },
    }
}
