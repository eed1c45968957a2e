//! The user-mode network: the guest fetches 10 MB from a server on the host's loopback, and the host fetches 10 MB
//! from the guest through a forwarded port; the checksums must be equal. Ping, UDP and a refused connection.

use std::net::{Ipv4Addr, TcpListener};

use super::{Row, cpus_name};
use crate::config::{Boot, VmConfig};
use crate::expected::{pattern, pattern_sum, sum};
use crate::http::{self, FileServer};
use crate::shell::Shell;
use crate::stage::{Failure, Stage, Tier};
use crate::tftp;

const KIB: usize = 10 * 1024;
const GUEST_PORT: u16 = 8080;

pub(super) fn rows() -> Vec<Row> {
    let mut rows = vec![
        Row::new("network/ping-udp-refusal", Tier::Test, "cloud", ping_udp_refusal)
            .not_in_lab("the laboratory passes on TCP alone"),
    ];
    for cpus in [1, 2] {
        let tier = if cpus == 2 { Tier::Test } else { Tier::Campaign };
        let name = format!("network/fetch-and-serve-10MB/{}", cpus_name(cpus));
        rows.push(Row::new(name, tier, "cloud", move |stage| fetch_and_serve(stage, cpus)));
    }
    rows
}

fn ping_udp_refusal(stage: &Stage) -> Result<(), Failure> {
    const CONTENT: &str = "by UDP from the host";
    let guest = stage.guest("cloud")?;
    let (tftp_port, refusing_port) = (tftp::serve(CONTENT)?, free_port()?);
    let mut vm = stage.start(&VmConfig::new(&guest, Boot::BzImage, 1, "bedplate.net=dhcp")?.net(&[]))?;
    let outcome = (|| {
        vm.console().expect("BEDPLATE-SHELL", stage.patience(30))?;
        let mut shell = Shell::at(vm.console(), stage.patience(10))?;
        shell.run("gateway=$(ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p')")?;
        let pinged = shell.run("ping -c 3 -W 10 $gateway")?;
        Failure::unless(pinged.contains(" 0% packet loss"), || format!("ping said:\n{pinged}"))?;
        let fetched = shell.run(&format!("cd /tmp && tftp -g -r file $gateway {tftp_port} && cat file"))?;
        Failure::unless(fetched == CONTENT, || format!("TFTP brought {fetched:?}"))?;
        // Nobody listens: the refusal of the host's kernel comes back as RST, at once.
        let (status, said) = shell.status(&format!("nc -w 30 $gateway {refusing_port} < /dev/null 2>&1"))?;
        Failure::unless(status != 0 && said.contains("refused"), || format!("nc said {status}: {said:?}"))?;
        shell.leave("poweroff -f")?;
        vm.wait(stage.patience(10)).map(|_| ())
    })();
    stage.keep(&vm);
    outcome
}

fn fetch_and_serve(stage: &Stage, cpus: u32) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let server = FileServer::start(pattern("from-the-host", KIB))?;
    let host_port = free_port()?;
    let words = format!(
        "bedplate.net=dhcp bedplate.net=fetch,http://GATEWAY:{}/file bedplate.net=serve,{GUEST_PORT},{KIB}",
        server.port()
    );
    let config = VmConfig::new(&guest, Boot::BzImage, cpus, &words)?.net(&[(host_port, GUEST_PORT)]);
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        vm.console().expect_line("BEDPLATE-NET address ", stage.patience(20))?;
        let answer = vm.console().expect_line("BEDPLATE-NET ", stage.patience(30))?;
        let expected = format!("fetched {} {} bytes", pattern_sum("from-the-host", KIB), KIB * 1024);
        Failure::unless(answer == expected, || {
            format!("the guest's fetch gave {answer:?}, not {expected:?}")
        })?;
        let answer = vm.console().expect_line("BEDPLATE-NET ", stage.patience(20))?;
        let expected = format!("serving {}", pattern_sum("bedplate-served", KIB));
        Failure::unless(answer == expected, || format!("the guest's server said {answer:?}"))?;

        let body = http::fetch(host_port, "/file", stage.patience(30))?;
        Failure::unless(
            body.len() == KIB * 1024 && sum(&body) == pattern_sum("bedplate-served", KIB),
            || format!("{} bytes came from the guest, sum {}", body.len(), sum(&body)),
        )?;
        vm.console().expect("BEDPLATE-SHELL", stage.patience(10))?;
        Shell::at(vm.console(), stage.patience(5))?.leave("poweroff -f")?;
        vm.wait(stage.patience(10)).map(|_| ())
    })();
    stage.keep(&vm);
    outcome
}

/// A port that was free a moment ago.
pub(super) fn free_port() -> Result<u16, Failure> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
