//! Puts fragmented IPv4 packets of the guest together (RFC 791 §3.2), within bounds.
//!
//! Called by: `usernet::nat` for each fragment.
//!
//! Invariants: at most `PACKETS` packets of at most 64 KiB are in the making, each for at most `LIFETIME`; the oldest
//! makes room. Overlapping fragments void their packet (RFC 5722's lesson). A packet comes out whole, with a header that
//! says so, or not at all.

use std::net::Ipv4Addr;

use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{IpProtocol, Ipv4Packet};

use super::link::IPV4_HEADER;

const PACKETS: usize = 8;
const LIFETIME: Duration = Duration::from_secs(15);
const MAX_PACKET: usize = 65_535;

type Key = (Ipv4Addr, Ipv4Addr, IpProtocol, u16);

#[derive(Debug)]
struct Partial {
    key: Key,
    since: Instant,
    /// Header and payload; the payload grows as fragments arrive.
    packet: Vec<u8>,
    /// Payload ranges that are there, by start, not touching each other.
    present: Vec<(usize, usize)>,
    /// Length of the payload, once the last fragment is known.
    end: Option<usize>,
}

/// Packets in the making.
#[derive(Debug, Default)]
pub(super) struct Reassembly {
    partial: Vec<Partial>,
}

impl Reassembly {
    /// Takes a fragment (header without options' meaning, `packet` is its exact length); gives a packet that it completes.
    pub(super) fn add(&mut self, packet: &Ipv4Packet<&[u8]>, now: Instant) -> Option<Vec<u8>> {
        self.partial.retain(|p| now < p.since + LIFETIME);
        let key = (packet.src_addr(), packet.dst_addr(), packet.next_header(), packet.ident());
        let found = self.partial.iter().position(|p| p.key == key);
        let index = found.unwrap_or_else(|| {
            if self.partial.len() >= PACKETS {
                self.partial.remove(0);
            }
            let packet = vec![0; IPV4_HEADER];
            self.partial.push(Partial { key, since: now, packet, present: Vec::new(), end: None });
            self.partial.len() - 1
        });
        match self.partial[index].add(packet) {
            Ok(false) => None,
            Ok(true) => Some(self.partial.remove(index).finish()),
            Err(Void) => {
                self.partial.remove(index);
                None
            }
        }
    }
}

/// The fragments contradict each other or the rules.
struct Void;

impl Partial {
    /// Adds a fragment; says whether the packet is whole.
    fn add(&mut self, fragment: &Ipv4Packet<&[u8]>) -> Result<bool, Void> {
        let data = fragment.payload();
        let (start, more) = (usize::from(fragment.frag_offset()), fragment.more_frags());
        let end = start + data.len();
        let misplaced =
            end + IPV4_HEADER > MAX_PACKET || data.is_empty() || (more && !data.len().is_multiple_of(8));
        let beyond = self.end.is_some_and(|known| end > known || (!more && end != known));
        let before_others = !more && self.present.last().is_some_and(|(_, last)| *last > end);
        if misplaced || beyond || before_others {
            return Err(Void);
        }
        let at = self.present.partition_point(|(s, _)| *s < start);
        if self.present.get(at) == Some(&(start, end)) {
            return Ok(false); // The same fragment once more.
        }
        let clear_before = at == 0 || self.present[at - 1].1 <= start;
        let clear_after = self.present.get(at).is_none_or(|(s, _)| *s >= end);
        if !clear_before || !clear_after {
            return Err(Void);
        }
        if !more {
            self.end = Some(end);
        }
        self.present.insert(at, (start, end));
        let needed = IPV4_HEADER + end;
        if self.packet.len() < needed {
            self.packet.resize(needed, 0);
        }
        self.packet[IPV4_HEADER + start..needed].copy_from_slice(data);
        let contiguous = self.present.iter().try_fold(0, |at, (s, e)| (*s == at).then_some(*e));
        Ok(self.end.is_some() && contiguous == self.end)
    }

    fn finish(mut self) -> Vec<u8> {
        let (from, to, protocol, ident) = self.key;
        let len = self.packet.len() as u16;
        let mut header = Ipv4Packet::new_unchecked(&mut self.packet[..]);
        header.set_version(4);
        header.set_header_len(IPV4_HEADER as u8);
        header.set_total_len(len);
        header.set_ident(ident);
        header.set_hop_limit(64);
        header.set_next_header(protocol);
        header.set_src_addr(from);
        header.set_dst_addr(to);
        header.fill_checksum();
        self.packet
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fragment(ident: u16, offset: usize, data: &[u8], more: bool) -> Vec<u8> {
        let mut bytes = vec![0; IPV4_HEADER + data.len()];
        bytes[IPV4_HEADER..].copy_from_slice(data);
        let len = bytes.len() as u16;
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
        packet.set_version(4);
        packet.set_header_len(20);
        packet.set_total_len(len);
        packet.set_ident(ident);
        packet.set_frag_offset(offset as u16);
        packet.set_more_frags(more);
        packet.set_src_addr(Ipv4Addr::new(10, 0, 2, 15));
        packet.set_dst_addr(Ipv4Addr::new(192, 0, 2, 1));
        bytes
    }

    fn add(reassembly: &mut Reassembly, bytes: &[u8]) -> Option<Vec<u8>> {
        reassembly.add(&Ipv4Packet::new_checked(bytes).unwrap(), Instant::ZERO)
    }

    proptest! {
        #[test]
        fn any_cut_in_any_order_gives_the_packet_back(len in 17usize..5000, piece in 1usize..100, seed in any::<u64>()) {
            let data: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let mut parts: Vec<Vec<u8>> = data
                .chunks(piece * 8)
                .enumerate()
                .map(|(i, part)| fragment(7, i * piece * 8, part, (i + 1) * piece * 8 < len))
                .collect();
            let mut state = seed | 1;
            for i in (1..parts.len()).rev() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                parts.swap(i, (state >> 33) as usize % (i + 1));
            }
            let mut reassembly = Reassembly::default();
            let whole: Vec<Vec<u8>> = parts.iter().filter_map(|p| add(&mut reassembly, p)).collect();
            prop_assert_eq!(whole.len(), 1);
            let packet = Ipv4Packet::new_checked(&whole[0][..]).unwrap();
            prop_assert!(packet.verify_checksum() && !packet.more_frags() && packet.frag_offset() == 0);
            prop_assert_eq!(packet.payload(), &data[..]);
        }

        #[test]
        fn hostile_fragments_stay_bounded(parts in proptest::collection::vec((0u16..20, 0u16..8192, 0usize..1480, any::<bool>()), 0..200)) {
            let mut reassembly = Reassembly::default();
            for (ident, offset, len, more) in parts {
                let _ = add(&mut reassembly, &fragment(ident, usize::from(offset) * 8, &vec![0; len], more));
            }
            prop_assert!(reassembly.partial.len() <= PACKETS);
            prop_assert!(reassembly.partial.iter().all(|p| p.packet.len() <= MAX_PACKET));
        }
    }

    #[test]
    fn overlaps_void_the_packet_and_time_ends_it() {
        let mut reassembly = Reassembly::default();
        assert!(add(&mut reassembly, &fragment(1, 0, &[1; 16], true)).is_none());
        assert!(add(&mut reassembly, &fragment(1, 8, &[2; 16], false)).is_none());
        assert!(reassembly.partial.is_empty());
        assert!(add(&mut reassembly, &fragment(2, 0, &[1; 16], true)).is_none());
        let late = fragment(2, 16, &[1; 16], false);
        let late = Ipv4Packet::new_checked(&late[..]).unwrap();
        assert!(reassembly.add(&late, Instant::ZERO + LIFETIME).is_none());
    }
}
