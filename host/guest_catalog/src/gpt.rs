//! Writes the partition table of a disk image that holds one Linux partition: protective MBR, primary and backup
//! GPT (UEFI specification 2.10, chapter 5). Used for the Debian disk, so that no loop device and no root rights
//! are needed.
//!
//! Invariants: the partition starts at [`PARTITION_START_BYTES`]; identifiers are fixed, so that equal content gives
//! equal bytes.

use std::io::{self, Seek, SeekFrom, Write};

/// Where the partition begins (1 MiB, the usual alignment).
pub const PARTITION_START_BYTES: u64 = 1 << 20;
/// What must stay free at the end: the backup table, rounded up to 1 MiB.
pub const TAIL_BYTES: u64 = 1 << 20;

const SECTOR: u64 = 512;
const ENTRY_COUNT: u32 = 128;
const ENTRY_BYTES: u32 = 128;
const TABLE_SECTORS: u64 = ENTRY_COUNT as u64 * ENTRY_BYTES as u64 / SECTOR;
/// 4f68bce3-e8cd-4db1-96e7-fbcaf984b709: a root partition for x86-64, in the mixed byte order of GPT.
const LINUX_ROOT_X86_64: [u8; 16] =
    [0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09];
const DISK_ID: [u8; 16] = *b"bedplate-disk\x40\x80\x01";
const PARTITION_ID: [u8; 16] = *b"bedplate-part\x40\x80\x01";

/// Lays the table around one partition that fills the disk; the partition's content is not touched.
///
/// # Errors
/// A disk too small to hold a partition, or the writer's errors.
pub fn write_table<W: Write + Seek>(disk: &mut W, disk_bytes: u64, name: &str) -> io::Result<()> {
    if disk_bytes < PARTITION_START_BYTES + TAIL_BYTES + SECTOR || !disk_bytes.is_multiple_of(SECTOR) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "disk too small or not in whole sectors"));
    }
    let sectors = disk_bytes / SECTOR;
    let first = PARTITION_START_BYTES / SECTOR;
    let last = (disk_bytes - TAIL_BYTES) / SECTOR - 1;
    let entries = partition_entries(first, last, name);

    disk.seek(SeekFrom::Start(0))?;
    disk.write_all(&protective_mbr(sectors))?;
    disk.write_all(&header(1, sectors - 1, 2, sectors, &entries))?;
    disk.write_all(&entries)?;
    let backup_entries = sectors - 1 - TABLE_SECTORS;
    disk.seek(SeekFrom::Start(backup_entries * SECTOR))?;
    disk.write_all(&entries)?;
    disk.write_all(&header(sectors - 1, 1, backup_entries, sectors, &entries))
}

fn protective_mbr(sectors: u64) -> [u8; 512] {
    let mut mbr = [0; 512];
    let size = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    mbr[446..454].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
    mbr[454..458].copy_from_slice(&1u32.to_le_bytes());
    mbr[458..462].copy_from_slice(&size.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    mbr
}

fn partition_entries(first: u64, last: u64, name: &str) -> Vec<u8> {
    let mut entries = vec![0; (ENTRY_COUNT * ENTRY_BYTES) as usize];
    entries[..16].copy_from_slice(&LINUX_ROOT_X86_64);
    entries[16..32].copy_from_slice(&PARTITION_ID);
    entries[32..40].copy_from_slice(&first.to_le_bytes());
    entries[40..48].copy_from_slice(&last.to_le_bytes());
    for (unit, slot) in name.encode_utf16().zip(entries[56..128].chunks_exact_mut(2)) {
        slot.copy_from_slice(&unit.to_le_bytes());
    }
    entries
}

fn header(here: u64, other: u64, entries_at: u64, sectors: u64, entries: &[u8]) -> [u8; 512] {
    let mut header = [0; 512];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
    header[12..16].copy_from_slice(&92u32.to_le_bytes());
    header[24..32].copy_from_slice(&here.to_le_bytes());
    header[32..40].copy_from_slice(&other.to_le_bytes());
    header[40..48].copy_from_slice(&(2 + TABLE_SECTORS).to_le_bytes());
    header[48..56].copy_from_slice(&(sectors - 2 - TABLE_SECTORS).to_le_bytes());
    header[56..72].copy_from_slice(&DISK_ID);
    header[72..80].copy_from_slice(&entries_at.to_le_bytes());
    header[80..84].copy_from_slice(&ENTRY_COUNT.to_le_bytes());
    header[84..88].copy_from_slice(&ENTRY_BYTES.to_le_bytes());
    header[88..92].copy_from_slice(&crc32(entries).to_le_bytes());
    let sum = crc32(&header[..92]);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    header
}

/// CRC-32 as in Ethernet; a few hundred bytes at a time, so bit by bit is fast enough.
fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn crc_of_the_usual_check_string() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn both_headers_name_each_other_and_their_tables() {
        let bytes = 8 << 20;
        let mut disk = Cursor::new(vec![0; bytes]);
        write_table(&mut disk, bytes as u64, "root").unwrap();
        let disk = disk.into_inner();
        assert_eq!(disk.len(), bytes);
        let word = |at: usize| u64::from_le_bytes(disk[at..at + 8].try_into().unwrap());
        let last_sector = bytes as u64 / SECTOR - 1;
        let backup = last_sector as usize * 512;
        assert_eq!(&disk[512..520], b"EFI PART");
        assert_eq!(&disk[backup..backup + 8], b"EFI PART");
        assert_eq!((word(512 + 24), word(512 + 32)), (1, last_sector));
        assert_eq!((word(backup + 24), word(backup + 32)), (last_sector, 1));
        let table = word(backup + 72) as usize * 512;
        assert_eq!(disk[1024..1024 + 128], disk[table..table + 128]);
        assert_eq!((word(1024 + 32), word(1024 + 40)), (2048, (bytes as u64 - TAIL_BYTES) / SECTOR - 1));
    }

    #[test]
    fn a_disk_without_room_is_refused() {
        assert!(write_table(&mut Cursor::new(vec![0; 4096]), 4096, "root").is_err());
    }
}
