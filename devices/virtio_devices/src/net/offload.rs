//! What a driver leaves to the card when it sends: checksums, and cutting long TCP segments
//! (VIRTIO 1.2, 5.1.6.2; RFC 1071).
//!
//! Everything here is the guest's: offsets and sizes are checked against the frame, and what makes no sense is
//! sent as it is or dropped, as a real card would.

use crate::backend::Busy;
use alloc::vec::Vec;

/// Bytes of the header in front of each packet (`virtio_net_hdr` with `num_buffers`).
pub const HEADER_BYTES: usize = 12;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
/// Flag of the GSO type: the segment has congestion bits.
const GSO_ECN: u8 = 0x80;

/// Smallest piece that a long segment is cut into (Linux's smallest MSS): keeps the number of frames in bounds.
const LEAST_SEGMENT: usize = 48;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const TCP_FIN_PSH: u8 = 0x09;
const TCP_CWR: u8 = 0x80;

/// Hands `packet` to `send` as frames fit for a wire. A `Busy` of `send` ends it.
pub fn frames(
    header: &[u8; HEADER_BYTES],
    packet: &mut [u8],
    mut send: impl FnMut(&[u8]) -> Result<(), Busy>,
) -> Result<(), Busy> {
    let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (flags, gso) = (header[0], header[1] & !GSO_ECN);
    let (size, start, offset) = (word(4), word(6), word(8));
    match gso {
        GSO_NONE => {
            if flags & NEEDS_CHECKSUM != 0 {
                complete_checksum(packet, start, offset);
            }
            send(packet)
        }
        GSO_TCP4 | GSO_TCP6 => match Segment::parse(packet, start, gso == GSO_TCP6) {
            Some(segment) => segment.cut(packet, size.max(LEAST_SEGMENT), send),
            None => Ok(()),
        },
        // Never negotiated.
        _ => Ok(()),
    }
}

/// Sum of 16-bit words, not folded.
fn sum(bytes: &[u8], mut total: u64) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    for word in words {
        total += u64::from(u16::from_be_bytes(*word));
    }
    if let [last] = rest {
        total += u64::from(*last) << 8;
    }
    total
}

fn fold(mut total: u64) -> u16 {
    while total > 0xFFFF {
        total = (total & 0xFFFF) + (total >> 16);
    }
    total as u16
}

/// The driver put the sum of the pseudo-header into the field; the card adds the rest.
fn complete_checksum(packet: &mut [u8], start: usize, offset: usize) {
    let Some(at) = start.checked_add(offset) else { return };
    if at + 2 > packet.len() || start > packet.len() {
        return;
    }
    let checksum = !fold(sum(&packet[start..], 0));
    // Zero says "no checksum" in UDP; both forms are the same number.
    let checksum = if checksum == 0 { 0xFFFF } else { checksum };
    packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

/// A long TCP segment: where its headers are.
struct Segment {
    ip: usize,
    tcp: usize,
    payload: usize,
    is_ipv6: bool,
}

impl Segment {
    fn parse(packet: &[u8], tcp: usize, is_ipv6: bool) -> Option<Self> {
        // Ethernet, with one VLAN tag or none.
        let tagged = packet.get(12..14)? == [0x81, 0];
        let ip = if tagged { 18 } else { 14 };
        let least = if is_ipv6 { IPV6_HEADER } else { IPV4_HEADER };
        let version = packet.get(ip)? >> 4;
        if tcp < ip + least || version != if is_ipv6 { 6 } else { 4 } {
            return None;
        }
        let data_offset = usize::from(packet.get(tcp + 12)? >> 4) * 4;
        let payload = tcp + data_offset;
        (data_offset >= TCP_HEADER && payload < packet.len()).then_some(Self { ip, tcp, payload, is_ipv6 })
    }

    /// Sends pieces of at most `size` bytes of payload, each with headers of its own.
    fn cut(
        &self,
        packet: &[u8],
        size: usize,
        mut send: impl FnMut(&[u8]) -> Result<(), Busy>,
    ) -> Result<(), Busy> {
        let (headers, payload) = packet.split_at(self.payload);
        let pieces = payload.chunks(size);
        let last = pieces.len() - 1;
        let mut frame = Vec::with_capacity(headers.len() + size);
        for (i, piece) in pieces.enumerate() {
            frame.clear();
            frame.extend_from_slice(headers);
            frame.extend_from_slice(piece);
            self.finish(&mut frame, i, i * size, i == last);
            send(&frame)?;
        }
        Ok(())
    }

    /// Makes the headers of piece `index`, `done` bytes into the payload, right.
    fn finish(&self, frame: &mut [u8], index: usize, done: usize, is_last: bool) {
        let Self { ip, tcp, is_ipv6, .. } = *self;
        let ip_bytes = frame.len() - ip;
        if is_ipv6 {
            let length = (ip_bytes - IPV6_HEADER) as u16;
            frame[ip + 4..ip + 6].copy_from_slice(&length.to_be_bytes());
        } else {
            frame[ip + 2..ip + 4].copy_from_slice(&(ip_bytes as u16).to_be_bytes());
            let id = u16::from_be_bytes([frame[ip + 4], frame[ip + 5]]).wrapping_add(index as u16);
            frame[ip + 4..ip + 6].copy_from_slice(&id.to_be_bytes());
            frame[ip + 10..ip + 12].fill(0);
            let checksum = !fold(sum(&frame[ip..tcp], 0));
            frame[ip + 10..ip + 12].copy_from_slice(&checksum.to_be_bytes());
        }
        let old = [frame[tcp + 4], frame[tcp + 5], frame[tcp + 6], frame[tcp + 7]];
        let sequence = u32::from_be_bytes(old).wrapping_add(done as u32);
        frame[tcp + 4..tcp + 8].copy_from_slice(&sequence.to_be_bytes());
        if !is_last {
            frame[tcp + 13] &= !TCP_FIN_PSH;
        }
        if index != 0 {
            frame[tcp + 13] &= !TCP_CWR;
        }
        frame[tcp + 16..tcp + 18].fill(0);
        let addresses = if is_ipv6 { &frame[ip + 8..ip + 40] } else { &frame[ip + 12..ip + 20] };
        const TCP: u64 = 6;
        let pseudo = sum(addresses, TCP + (frame.len() - tcp) as u64);
        let checksum = !fold(sum(&frame[tcp..], pseudo));
        frame[tcp + 16..tcp + 18].copy_from_slice(&checksum.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn collect(header: &[u8; HEADER_BYTES], packet: &mut [u8]) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        frames(header, packet, |f| {
            out.push(f.to_vec());
            Ok(())
        })
        .unwrap();
        out
    }

    /// A TCP packet over IPv4 or IPv6 with `payload` bytes.
    fn packet(is_ipv6: bool, payload: usize) -> (Vec<u8>, usize) {
        let mut p = alloc::vec![2; 12];
        p.extend_from_slice(if is_ipv6 { &[0x86, 0xDD] } else { &[8, 0] });
        if is_ipv6 {
            p.extend_from_slice(&[0x60, 0, 0, 0, 0, 0, 6, 64]);
            p.extend(1..33);
        } else {
            p.extend_from_slice(&[
                0x45, 0, 0, 0, 0xFF, 0xFF, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2,
            ]);
        }
        let tcp = p.len();
        p.extend_from_slice(&[
            0, 80, 0, 81, 0xFF, 0xFF, 0xFF, 0, 1, 2, 3, 4, 0x50, 0x99, 0x10, 0, 0, 0, 0, 0,
        ]);
        p.extend((0..payload).map(|i| i as u8));
        (p, tcp)
    }

    fn gso(kind: u8, size: u16, tcp: usize) -> [u8; HEADER_BYTES] {
        let mut h = [0; HEADER_BYTES];
        (h[0], h[1]) = (NEEDS_CHECKSUM, kind);
        h[4..6].copy_from_slice(&size.to_le_bytes());
        h[6..8].copy_from_slice(&(tcp as u16).to_le_bytes());
        h[8..10].copy_from_slice(&16u16.to_le_bytes());
        h
    }

    #[test]
    fn long_segments_are_cut() {
        for is_ipv6 in [false, true] {
            let (mut p, tcp) = packet(is_ipv6, 3000);
            let kind = if is_ipv6 { GSO_TCP6 } else { GSO_TCP4 };
            let out = collect(&gso(kind, 1400, tcp), &mut p);
            assert_eq!(out.iter().map(|f| f.len() - tcp - 20).collect::<Vec<_>>(), [1400, 1400, 200]);
            for (i, f) in out.iter().enumerate() {
                let sequence = u32::from_be_bytes(f[tcp + 4..tcp + 8].try_into().unwrap());
                assert_eq!(sequence, 0xFFFF_FF00u32.wrapping_add(1400 * i as u32));
                // Congestion bit in the first, end and push in the last.
                assert_eq!(f[tcp + 13], [0x90, 0x10, 0x19][i]);
                let (addresses, length) = if is_ipv6 { (22..54, 18..20) } else { (26..34, 16..18) };
                let pseudo = sum(&f[addresses], 6 + (f.len() - tcp) as u64);
                assert_eq!(fold(sum(&f[tcp..], pseudo)), 0xFFFF);
                let length = usize::from(u16::from_be_bytes(f[length].try_into().unwrap()));
                assert_eq!(length, f.len() - if is_ipv6 { tcp } else { 14 });
                if !is_ipv6 {
                    assert_eq!(fold(sum(&f[14..34], 0)), 0xFFFF);
                    assert_eq!(f[18..20], 0xFFFFu16.wrapping_add(i as u16).to_be_bytes());
                }
            }
        }
    }

    #[test]
    fn checksums_are_completed() {
        let (mut p, tcp) = packet(false, 101);
        let pseudo = fold(sum(&p[26..34], 6 + (p.len() - tcp) as u64));
        p[tcp + 16..tcp + 18].copy_from_slice(&pseudo.to_be_bytes());
        let out = collect(&gso(GSO_NONE, 0, tcp), &mut p);
        let pseudo = u64::from(pseudo);
        assert_eq!(fold(sum(&out[0][tcp..], pseudo)), 0xFFFF);
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(
            header in any::<[u8; HEADER_BYTES]>(),
            kind in 0u8..6,
            mut noise in proptest::collection::vec(any::<u8>(), 0..200),
            payload in 0usize..2000,
        ) {
            let mut header = header;
            header[1] = kind;
            collect(&header, &mut noise);
            let (mut p, _) = packet(kind == GSO_TCP6, payload);
            let frames = collect(&header, &mut p);
            prop_assert!(frames.len() <= payload / LEAST_SEGMENT + 1);
            header[6..8].copy_from_slice(&34u16.to_le_bytes());
            collect(&header, &mut p);
        }
    }
}
