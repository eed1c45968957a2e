//! The DHCP server (RFC 2131, 2132): one address, one lease, for whoever is on the guest's side.
//!
//! Called by: `usernet::nat` for datagrams to port 67. Invariants: a pure function of the request; requests are parsed
//! with every length checked, and an answer is at most one Ethernet frame.

use std::net::Ipv4Addr;

use smoltcp::wire::EthernetAddress;

use super::addresses::{BROADCAST, DNS, GATEWAY, GUEST, MTU, NETMASK};

pub(super) const SERVER_PORT: u16 = 67;
pub(super) const CLIENT_PORT: u16 = 68;

const FIXED_BYTES: usize = 236;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
const LEASE_SECONDS: u32 = 86_400;
const BOOT_REQUEST: u8 = 1;
const BOOT_REPLY: u8 = 2;
const BROADCAST_FLAG: u8 = 0x80;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// An answer and where it goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) mac: EthernetAddress,
    pub(super) to: Ipv4Addr,
    pub(super) message: Vec<u8>,
}

/// What we look at in a request.
struct Request<'a> {
    fixed: &'a [u8],
    kind: u8,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    client_id: Option<&'a [u8]>,
}

impl<'a> Request<'a> {
    fn parse(message: &'a [u8]) -> Option<Request<'a>> {
        let (fixed, rest) = message.split_at_checked(FIXED_BYTES)?;
        let mut options = rest.strip_prefix(&COOKIE)?;
        let is_ethernet = fixed[1] == 1 && fixed[2] == 6;
        if fixed[0] != BOOT_REQUEST || !is_ethernet {
            return None;
        }
        let mut request = Request { fixed, kind: 0, requested: None, server: None, client_id: None };
        while let Some((&code, rest)) = options.split_first() {
            match code {
                0 => options = rest,
                255 => break,
                _ => {
                    let (&len, rest) = rest.split_first()?;
                    let (data, rest) = rest.split_at_checked(len.into())?;
                    let address = || <[u8; 4]>::try_from(data).ok().map(Ipv4Addr::from);
                    match code {
                        53 => request.kind = *data.first()?,
                        50 => request.requested = address(),
                        54 => request.server = address(),
                        61 => request.client_id = Some(data),
                        _ => {}
                    }
                    options = rest;
                }
            }
        }
        Some(request)
    }

    fn mac(&self) -> EthernetAddress {
        EthernetAddress::from_bytes(&self.fixed[28..34])
    }

    fn client_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.fixed[12], self.fixed[13], self.fixed[14], self.fixed[15])
    }

    fn wants_broadcast(&self) -> bool {
        self.fixed[10] & BROADCAST_FLAG != 0
    }
}

/// Answers a DHCP message, if it calls for an answer from us.
pub(super) fn answer(message: &[u8], hostname: Option<&str>) -> Option<Reply> {
    let request = Request::parse(message)?;
    if !request.mac().is_unicast() || request.server.is_some_and(|server| server != GATEWAY) {
        return None; // A client that chose another server speaks to that one.
    }
    let (kind, address) = match request.kind {
        DISCOVER => (OFFER, GUEST),
        REQUEST => {
            let wanted = request.requested.unwrap_or(request.client_address());
            if wanted == GUEST { (ACK, GUEST) } else { (NAK, Ipv4Addr::UNSPECIFIED) }
        }
        INFORM => (ACK, Ipv4Addr::UNSPECIFIED),
        _ => return None, // RELEASE and DECLINE need no answer: the address is always the same one.
    };
    // RFC 2131 §4.1: to the client's address if it has one, else to the offered one unless it asked for broadcast.
    let client = request.client_address();
    let broadcast = kind == NAK || (client.is_unspecified() && request.wants_broadcast());
    let (mac, to) = match broadcast {
        true => (EthernetAddress::BROADCAST, Ipv4Addr::BROADCAST),
        false if client.is_unspecified() => (request.mac(), GUEST),
        false => (request.mac(), client),
    };
    Some(Reply { mac, to, message: compose(&request, kind, address, hostname) })
}

fn compose(request: &Request<'_>, kind: u8, address: Ipv4Addr, hostname: Option<&str>) -> Vec<u8> {
    let mut message = vec![0; FIXED_BYTES];
    message[0] = BOOT_REPLY;
    message[1..3].copy_from_slice(&[1, 6]);
    message[4..8].copy_from_slice(&request.fixed[4..8]); // Transaction.
    message[10..12].copy_from_slice(&request.fixed[10..12]); // Flags.
    if kind == ACK {
        message[12..16].copy_from_slice(&request.fixed[12..16]); // Client's address.
    }
    message[16..20].copy_from_slice(&address.octets());
    message[24..28].copy_from_slice(&request.fixed[24..28]); // Relay agent.
    message[28..44].copy_from_slice(&request.fixed[28..44]); // Hardware address.
    message.extend(COOKIE);

    let mut option = |code: u8, data: &[u8]| {
        message.extend([code, data.len() as u8]);
        message.extend(data);
    };
    option(53, &[kind]);
    option(54, &GATEWAY.octets());
    if let Some(id) = request.client_id {
        option(61, id); // RFC 6842.
    }
    if kind != NAK {
        if !address.is_unspecified() {
            option(51, &LEASE_SECONDS.to_be_bytes());
        }
        option(1, &NETMASK.octets());
        option(3, &GATEWAY.octets());
        option(6, &DNS.octets());
        option(28, &BROADCAST.octets());
        option(26, &MTU.to_be_bytes());
        if let Some(name) = hostname {
            option(12, name.as_bytes());
        }
    }
    message.push(255);
    message.resize(message.len().max(300), 0); // The BOOTP minimum, which old clients insist on.
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    fn request(kind: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut message = vec![0; FIXED_BYTES];
        message[..3].copy_from_slice(&[1, 1, 6]);
        message[4..8].copy_from_slice(b"xid!");
        message[28..34].copy_from_slice(&MAC);
        message.extend(COOKIE);
        message.extend([53, 1, kind]);
        for (code, data) in options {
            message.extend([*code, data.len() as u8]);
            message.extend(*data);
        }
        message.push(255);
        message
    }

    fn option(message: &[u8], code: u8) -> Option<Vec<u8>> {
        let mut rest = &message[FIXED_BYTES + 4..];
        while rest[0] != 255 {
            let (data, next) = rest[2..].split_at(rest[1].into());
            if rest[0] == code {
                return Some(data.to_vec());
            }
            rest = next;
        }
        None
    }

    #[test]
    fn discover_and_request_give_the_lease() {
        let id: &[u8] = &[255, 1, 2, 3, 4, 5, 6, 7, 8];
        let offer = answer(&request(DISCOVER, &[(61, id)]), Some("vm1")).unwrap();
        assert_eq!((offer.mac.0, offer.to), (MAC, GUEST));
        let m = &offer.message;
        assert_eq!((&m[4..8], &m[16..20], m.len() >= 300), (&b"xid!"[..], &GUEST.octets()[..], true));
        for (code, expected) in [
            (53, vec![OFFER]),
            (54, vec![10, 0, 2, 2]),
            (51, vec![0, 1, 0x51, 0x80]),
            (1, vec![255, 255, 255, 0]),
            (3, vec![10, 0, 2, 2]),
            (6, vec![10, 0, 2, 3]),
            (12, b"vm1".to_vec()),
            (26, vec![5, 220]),
            (61, id.to_vec()),
        ] {
            assert_eq!(option(m, code), Some(expected), "option {code}");
        }
        let ack = answer(&request(REQUEST, &[(50, &GUEST.octets()), (54, &GATEWAY.octets())]), None).unwrap();
        assert_eq!(option(&ack.message, 53), Some(vec![ACK]));
        assert_eq!(option(&ack.message, 12), None);
    }

    #[test]
    fn renewals_other_servers_and_wrong_addresses() {
        let mut renewal = request(REQUEST, &[]);
        renewal[12..16].copy_from_slice(&GUEST.octets());
        let ack = answer(&renewal, None).unwrap();
        assert_eq!((ack.to, option(&ack.message, 53)), (GUEST, Some(vec![ACK])));

        let nak = answer(&request(REQUEST, &[(50, &[192, 168, 1, 5])]), None).unwrap();
        assert_eq!((nak.to, nak.mac), (Ipv4Addr::BROADCAST, EthernetAddress::BROADCAST));
        assert_eq!((option(&nak.message, 53), option(&nak.message, 51)), (Some(vec![NAK]), None));

        let mut inform = request(INFORM, &[]);
        inform[12..16].copy_from_slice(&[10, 0, 2, 40]);
        let ack = answer(&inform, None).unwrap();
        assert_eq!((ack.to, &ack.message[16..20]), (Ipv4Addr::new(10, 0, 2, 40), &[0u8; 4][..]));
        assert_eq!((option(&ack.message, 51), option(&ack.message, 6)), (None, Some(vec![10, 0, 2, 3])));

        assert_eq!(answer(&request(REQUEST, &[(54, &[10, 0, 2, 9])]), None), None);
        assert_eq!(answer(&request(7, &[]), None), None, "RELEASE");
        let mut broadcast = request(DISCOVER, &[]);
        broadcast[10] = BROADCAST_FLAG;
        assert_eq!(answer(&broadcast, None).unwrap().to, Ipv4Addr::BROADCAST);
    }

    proptest! {
        #[test]
        fn no_message_is_a_surprise(mut message in proptest::collection::vec(any::<u8>(), 0..700), plausible in any::<bool>()) {
            if plausible && message.len() > FIXED_BYTES + 7 {
                message[..3].copy_from_slice(&[1, 1, 6]);
                message[FIXED_BYTES..FIXED_BYTES + 4].copy_from_slice(&COOKIE);
            }
            if let Some(reply) = answer(&message, Some("vm")) {
                prop_assert!(reply.message.len() < 1000);
            }
        }
    }
}
