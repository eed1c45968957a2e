//! A file server on the host's loopback for the network trials, and the client that fetches from a guest through a
//! forwarded port. Just enough HTTP/1.0 for busybox's wget and httpd.
//!
//! The peer is a guest: request heads and bodies are capped.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

const MAX_HEAD_BYTES: usize = 8 << 10;
const MAX_BODY_BYTES: u64 = 256 << 20;
const IDLE: Duration = Duration::from_secs(120);

/// Serves one file under any path until dropped.
#[derive(Debug)]
pub struct FileServer {
    address: SocketAddr,
    served: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
}

impl FileServer {
    /// Listens on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// Those of the sockets.
    pub fn start(content: Vec<u8>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let (served, stop) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, over, content) = (Arc::clone(&served), Arc::clone(&stop), Arc::new(content));
        std::thread::spawn(move || {
            for stream in listener.incoming().filter_map(Result::ok) {
                if over.load(Ordering::Acquire) {
                    return;
                }
                let (count, content) = (Arc::clone(&count), Arc::clone(&content));
                std::thread::spawn(move || {
                    if answer(stream, &content).is_ok() {
                        count.fetch_add(1, Ordering::AcqRel);
                    }
                });
            }
        });
        Ok(Self { address, served, stop })
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// How many requests were answered to the end.
    pub fn served(&self) -> u32 {
        self.served.load(Ordering::Acquire)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
    }
}

fn answer(mut stream: TcpStream, content: &[u8]) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        let count = stream.read(&mut piece)?;
        if count == 0 || head.len() > MAX_HEAD_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        head.extend_from_slice(&piece[..count]);
    }
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", content.len())?;
    stream.write_all(content)?;
    stream.flush()
}

/// Fetches `path` from 127.0.0.1:`port`, trying again until `patience` ends (the guest may still be starting).
///
/// # Errors
/// The last attempt's.
pub fn fetch(port: u16, path: &str, patience: Duration) -> io::Result<Vec<u8>> {
    let start = Instant::now();
    loop {
        match try_fetch(port, path, patience) {
            Err(_) if start.elapsed() < patience => std::thread::sleep(Duration::from_millis(500)),
            other => return other,
        }
    }
}

fn try_fetch(port: u16, path: &str, patience: Duration) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(patience))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: guest\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX_BODY_BYTES).read_to_end(&mut answer)?;
    let broken = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").ok_or_else(|| broken("no answer head"))?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    if head.split(' ').nth(1) != Some("200") {
        return Err(broken(head.lines().next().unwrap_or_default()));
    }
    let body = answer.split_off(end + 4);
    let announced = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok());
    match announced {
        Some(length) if length != body.len() => {
            Err(broken(&format!("{} of {length} bytes came", body.len())))
        }
        _ => Ok(body),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_served_is_fetched() {
        let content = crate::pattern("line", 700);
        let server = FileServer::start(content.clone()).unwrap();
        assert_eq!(fetch(server.port(), "/file", Duration::from_secs(10)).unwrap(), content);
        while server.served() == 0 {
            std::thread::yield_now();
        }
        let port = server.port();
        drop(server);
        assert!(fetch(port, "/file", Duration::from_millis(1)).is_err());
    }
}
