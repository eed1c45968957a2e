//! Takes the uncompressed kernel (a vmlinux ELF) out of a bzImage, for boot by PVH.
//! Linux Documentation/arch/x86/boot.rst: setup sectors at 0x1f1, "HdrS" at 0x202, payload at 0x248.
//!
//! Invariants: the image is hostile; the payload's own claim of its unpacked size bounds what is unpacked, and
//! that claim is capped by [`MAX_VMLINUX_BYTES`].

use std::io::Read;

/// More than any distribution's kernel unpacks to.
pub const MAX_VMLINUX_BYTES: usize = 512 << 20;

const SETUP_SECTORS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const VERSION_TEXT: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;
/// LZ4's legacy frame: the only one that the kernel's build uses.
const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

/// Why no vmlinux came out of an image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BzImageError {
    /// The magic number is missing or the image ends too early.
    #[error("it is not a bzImage ({0})")]
    NotBzImage(&'static str),
    /// The payload's compression is not one of gzip, xz, lz4, zstd.
    #[error("its payload is packed in an unknown way (first bytes {0:02x?})")]
    UnknownCompression([u8; 4]),
    /// The claimed size is out of bounds.
    #[error("its payload claims {0} bytes, more than the {MAX_VMLINUX_BYTES} allowed")]
    TooLarge(usize),
    /// The payload did not unpack to what it claims.
    #[error("its {kind} payload does not unpack: {reason}")]
    Corrupt {
        /// The compression.
        kind: &'static str,
        /// What went wrong.
        reason: String,
    },
}

/// The header's protocol version, such as `0x020f`.
///
/// # Errors
/// [`BzImageError::NotBzImage`].
pub fn protocol(image: &[u8]) -> Result<u16, BzImageError> {
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS") {
        return Err(BzImageError::NotBzImage("no HdrS at 0x202"));
    }
    let bytes = image.get(PROTOCOL..PROTOCOL + 2).ok_or(BzImageError::NotBzImage("header cut"))?;
    Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
}

/// The kernel's release (`6.1.0-50-cloud-amd64`), the first word of its version text.
pub fn release(image: &[u8]) -> Option<String> {
    protocol(image).ok()?;
    let at = image.get(VERSION_TEXT..VERSION_TEXT + 2)?;
    let start = usize::from(u16::from_le_bytes([at[0], at[1]])) + SECTOR;
    let text = image.get(start..start + 256)?;
    let end = text.iter().position(|b| !b.is_ascii_graphic())?;
    (end > 0).then(|| String::from_utf8_lossy(&text[..end]).into_owned())
}

/// Unpacks the payload.
///
/// # Errors
/// See [`BzImageError`].
pub fn extract_vmlinux(image: &[u8]) -> Result<Vec<u8>, BzImageError> {
    if protocol(image)? < 0x0208 {
        return Err(BzImageError::NotBzImage("boot protocol before 2.08 names no payload"));
    }
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let cut = BzImageError::NotBzImage("payload outside the file");
    let setup = match image.get(SETUP_SECTORS) {
        Some(0) | None => 4,
        Some(&sectors) => usize::from(sectors),
    };
    let (Some(offset), Some(length)) = (word(PAYLOAD_OFFSET), word(PAYLOAD_LENGTH)) else { return Err(cut) };
    let start = (setup + 1) * SECTOR + offset;
    let Some(payload) = start.checked_add(length).and_then(|end| image.get(start..end)) else {
        return Err(cut);
    };
    // The build appends the unpacked size to the compressed stream (for gzip it is the stream's own).
    let Some((packed, size)) = payload.split_last_chunk::<4>() else { return Err(cut) };
    let size = u32::from_le_bytes(*size) as usize;
    if size > MAX_VMLINUX_BYTES {
        return Err(BzImageError::TooLarge(size));
    }
    let kernel = unpack(payload, packed, size)?;
    if kernel.len() != size {
        return Err(BzImageError::Corrupt {
            kind: "kernel",
            reason: format!("{} of {size} bytes came out", kernel.len()),
        });
    }
    Ok(kernel)
}

/// `payload` includes the appended size, `packed` does not.
fn unpack(payload: &[u8], packed: &[u8], size: usize) -> Result<Vec<u8>, BzImageError> {
    let magic: [u8; 4] =
        packed.first_chunk().copied().ok_or(BzImageError::NotBzImage("payload of less than four bytes"))?;
    match magic {
        [0x1f, 0x8b, ..] => read_all("gzip", flate2::read::GzDecoder::new(payload), size),
        [0xfd, b'7', b'z', b'X'] => read_all("xz", lzma_rust2::XzReader::new(packed, false), size),
        LZ4_LEGACY_MAGIC => unpack_lz4(&packed[4..], size),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(packed)
                .map_err(|e| BzImageError::Corrupt { kind: "zstd", reason: e.to_string() })?;
            read_all("zstd", decoder, size)
        }
        other => Err(BzImageError::UnknownCompression(other)),
    }
}

fn read_all(kind: &'static str, reader: impl Read, size: usize) -> Result<Vec<u8>, BzImageError> {
    let mut out = Vec::new();
    let limit = size as u64 + 1;
    reader
        .take(limit)
        .read_to_end(&mut out)
        .map_err(|e| BzImageError::Corrupt { kind, reason: e.to_string() })?;
    Ok(out)
}

/// A legacy frame is a row of (length, block); every block unpacks to 8 MiB except the last.
fn unpack_lz4(mut rest: &[u8], size: usize) -> Result<Vec<u8>, BzImageError> {
    let corrupt = |reason: String| BzImageError::Corrupt { kind: "lz4", reason };
    let mut out = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let block = after.get(..length).ok_or_else(|| corrupt("a block ends outside the payload".into()))?;
        let unpacked =
            lz4_flex::block::decompress(block, LZ4_LEGACY_BLOCK).map_err(|e| corrupt(e.to_string()))?;
        if out.len() + unpacked.len() > size {
            return Err(corrupt("more bytes than claimed".into()));
        }
        out.extend_from_slice(&unpacked);
        rest = &after[length..];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn image(packed: &[u8], size: usize, own_size: bool) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR];
        image[SETUP_SECTORS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[PROTOCOL..PROTOCOL + 2].copy_from_slice(&0x020fu16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        let length = packed.len() + if own_size { 0 } else { 4 };
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(length as u32).to_le_bytes());
        image.extend_from_slice(&[0; 16]);
        image.extend_from_slice(packed);
        if !own_size {
            image.extend_from_slice(&(size as u32).to_le_bytes());
        }
        image
    }

    fn kernel() -> Vec<u8> {
        (0..40_000u32).map(|i| ((i * i) >> 7) as u8).collect()
    }

    #[test]
    fn gzip_payload() {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(&kernel()).unwrap();
        assert_eq!(extract_vmlinux(&image(&packer.finish().unwrap(), 0, true)).unwrap(), kernel());
    }

    #[test]
    fn lz4_payload() {
        let block = lz4_flex::block::compress(&kernel());
        let mut packed = LZ4_LEGACY_MAGIC.to_vec();
        packed.extend_from_slice(&(block.len() as u32).to_le_bytes());
        packed.extend_from_slice(&block);
        assert_eq!(extract_vmlinux(&image(&packed, kernel().len(), false)).unwrap(), kernel());
    }

    #[test]
    fn a_wrong_size_and_an_unknown_packing_are_told() {
        let block = lz4_flex::block::compress(&kernel());
        let mut packed = LZ4_LEGACY_MAGIC.to_vec();
        packed.extend_from_slice(&(block.len() as u32).to_le_bytes());
        packed.extend_from_slice(&block);
        assert!(matches!(
            extract_vmlinux(&image(&packed, kernel().len() + 1, false)),
            Err(BzImageError::Corrupt { .. })
        ));
        assert_eq!(
            extract_vmlinux(&image(b"BZh9....", 8, false)),
            Err(BzImageError::UnknownCompression(*b"BZh9"))
        );
        assert!(matches!(
            extract_vmlinux(&image(&packed, usize::MAX, false)),
            Err(BzImageError::TooLarge(_))
        ));
    }

    proptest! {
        #[test]
        fn hostile_images_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..3000), magic in any::<bool>()) {
            if magic && bytes.len() > 0x250 {
                bytes[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
            }
            let _ = extract_vmlinux(&bytes);
            let _ = release(&bytes);
        }
    }
}
