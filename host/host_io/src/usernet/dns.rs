//! Names: which name servers the host uses, and answers of our own from `/etc/hosts` when it uses none (RFC 1035).
//!
//! Called by: `usernet::nat` (routes to name servers, local answers) and `usernet::sockets` (reads the files).
//!
//! Invariants: with name servers we only forward; an answer is made only for a well-formed query with one question, and
//! is never longer than 512 bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::addresses::DNS_PORT;

const HEADER: usize = 12;
const MAX_ANSWERS: usize = 16;
const TTL_SECONDS: u32 = 60;
const TYPE_A: u16 = 1;
const TYPE_PTR: u16 = 12;
const TYPE_AAAA: u16 = 28;
const TYPE_ANY: u16 = 255;
const CLASS_IN: u16 = 1;

/// The name servers in the text of a resolv.conf, at most three as the C library does it.
pub(super) fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        words.next().filter(|_| is_server)?.parse::<IpAddr>().ok() // Scoped addresses (fe80::1%eth0) do not parse.
    };
    text.lines().filter_map(address).take(3).map(|ip| SocketAddr::new(ip, DNS_PORT)).collect()
}

/// Names and addresses of a hosts file.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    entries: Vec<(IpAddr, String)>,
}

impl Hosts {
    /// Reads the text of a hosts file. Loopback addresses would mean the guest itself, so only `localhost` keeps them.
    pub(super) fn parse(text: &str) -> Hosts {
        let mut entries = Vec::new();
        for line in text.lines() {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
            for name in words.filter(|name| !address.is_loopback() || *name == "localhost") {
                entries.push((address, name.to_ascii_lowercase()));
            }
        }
        Hosts { entries }
    }

    /// Answers a query; `None` for what is no query that can be answered at all.
    pub(super) fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let header = query.get(..HEADER)?;
        let is_query = header[2] & 0xf8 == 0; // QR = 0, OPCODE = 0.
        if !is_query || header[4..6] != [0, 1] {
            return None;
        }
        let (name, question_end) = parse_name(query, HEADER)?;
        let fixed = query.get(question_end..question_end + 4)?;
        let (kind, class) =
            (u16::from_be_bytes([fixed[0], fixed[1]]), u16::from_be_bytes([fixed[2], fixed[3]]));
        let answers = if class == CLASS_IN { self.records(&name, kind) } else { Vec::new() };
        let known = !answers.is_empty() || self.entries.iter().any(|(_, n)| *n == name);

        let mut reply = header[..2].to_vec();
        // QR, AA, RD as asked; RA; no such name (3) if we do not know it.
        reply.extend([0x84 | header[2] & 1, if known { 0x80 } else { 0x83 }]);
        reply.extend([0, 1, 0, answers.len() as u8, 0, 0, 0, 0]);
        reply.extend(&query[HEADER..question_end + 4]);
        for (kind, data) in answers {
            reply.extend([0xc0, HEADER as u8]);
            reply.extend(kind.to_be_bytes());
            reply.extend(CLASS_IN.to_be_bytes());
            reply.extend(TTL_SECONDS.to_be_bytes());
            reply.extend((data.len() as u16).to_be_bytes());
            reply.extend(data);
            if reply.len() > 512 {
                return None; // A hosts file with hundreds of names for one address; better no answer than a cut one.
            }
        }
        Some(reply)
    }

    fn records(&self, name: &str, kind: u16) -> Vec<(u16, Vec<u8>)> {
        let mut records = Vec::new();
        let reverse = parse_reverse(name);
        for (address, known) in &self.entries {
            let record = match address {
                IpAddr::V4(a) if *known == name && matches!(kind, TYPE_A | TYPE_ANY) => {
                    Some((TYPE_A, a.octets().to_vec()))
                }
                IpAddr::V6(a) if *known == name && matches!(kind, TYPE_AAAA | TYPE_ANY) => {
                    Some((TYPE_AAAA, a.octets().to_vec()))
                }
                _ if reverse == Some(*address) && matches!(kind, TYPE_PTR | TYPE_ANY) => {
                    encode_name(known).map(|name| (TYPE_PTR, name))
                }
                _ => None,
            };
            records.extend(record);
        }
        records.truncate(MAX_ANSWERS);
        records
    }
}

/// Reads an uncompressed name at `at`; gives it in lower case, and where it ends.
fn parse_name(message: &[u8], mut at: usize) -> Option<(String, usize)> {
    let mut name = String::new();
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1;
        match len {
            0 => return Some((name, at)),
            1..=63 if name.len() + len < 255 => {
                let label = std::str::from_utf8(message.get(at..at + len)?).ok()?;
                if !name.is_empty() {
                    name.push('.');
                }
                name.push_str(&label.to_ascii_lowercase());
                at += len;
            }
            _ => return None,
        }
    }
}

fn encode_name(name: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 {
            return None;
        }
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    Some(bytes)
}

/// The address of a name like `15.2.0.10.in-addr.arpa` or its IPv6 kin.
fn parse_reverse(name: &str) -> Option<IpAddr> {
    if let Some(v4) = name.strip_suffix(".in-addr.arpa") {
        let octets: Vec<u8> = v4.rsplit('.').map(str::parse).collect::<Result<_, _>>().ok()?;
        return Some(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?).into());
    }
    let v6 = name.strip_suffix(".ip6.arpa")?;
    let digits = v6.rsplit('.').map(|d| (d.len() == 1).then(|| u8::from_str_radix(d, 16).ok())?);
    let digits: Vec<u8> = digits.collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    (digits.len() == 32).then_some(())?;
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        message.extend(encode_name(name).unwrap());
        message.extend(kind.to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
        message
    }

    #[test]
    fn resolv_conf_is_read_like_the_c_library_does() {
        let text = "# x\nsearch a.b\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 # y\nnameserver fe80::1%eth0\noptions x\nnameserver 127.0.0.53\nnameserver 1.1.1.1\n";
        let found: Vec<String> = parse_resolv_conf(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[2001:db8::1]:53", "127.0.0.53:53"]);
    }

    #[test]
    fn names_of_the_hosts_file_are_answered() {
        let hosts = Hosts::parse(
            "127.0.0.1 localhost\n127.0.1.1 thishost\n192.0.2.7 Printer printer.lan # x\n2001:db8::7 printer\nbroken line\n",
        );
        let ask = |name: &str, kind| hosts.answer(&query(name, kind)).unwrap();
        let reply = ask("PRINTER", TYPE_A);
        assert_eq!(&reply[..8], &[0xab, 0xcd, 0x85, 0x80, 0, 1, 0, 1]);
        assert_eq!(&reply[reply.len() - 6..], &[0, 4, 192, 0, 2, 7]);
        assert_eq!(ask("printer", TYPE_AAAA)[7], 1);
        assert_eq!(ask("printer.lan", TYPE_AAAA)[3..8], [0x80, 0, 1, 0, 0], "known, but no such record");
        assert_eq!(ask("thishost", TYPE_A)[3] & 0xf, 3, "its loopback address is not the guest's");
        assert_eq!(ask("localhost", TYPE_A)[7], 1);
        let reply = ask("7.2.0.192.in-addr.arpa", TYPE_PTR);
        assert_eq!((reply[7], reply.ends_with(b"\x07printer\0")), (2, false));
        let v6 = "7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa";
        assert!(ask(v6, TYPE_PTR).ends_with(b"\x07printer\0"));
    }

    proptest! {
        #[test]
        fn no_query_is_a_surprise(mut message in proptest::collection::vec(any::<u8>(), 0..300), plausible in any::<bool>()) {
            if plausible && message.len() > HEADER {
                message[2] &= 7;
                message[4..6].copy_from_slice(&[0, 1]);
            }
            let hosts = Hosts::parse("192.0.2.7 a");
            if let Some(reply) = hosts.answer(&message) {
                prop_assert!(reply.len() <= 512);
            }
        }
    }
}
