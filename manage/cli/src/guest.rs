//! `bedplate guest`: known guests, prepared into the user's cache.

use crate::args::GuestCommand;
use guest_catalog::{Cache, Guest, Prepared, Progress, find, guests};
use indicatif::{ProgressBar, ProgressStyle};
use std::process::ExitCode;
use std::time::Duration;

/// Does it.
pub fn guest(command: &GuestCommand) -> anyhow::Result<ExitCode> {
    let cache = Cache::of_user()?;
    match command {
        GuestCommand::List => list(&cache),
        GuestCommand::Fetch { names, again } => {
            for guest in chosen(names)? {
                fetch(&cache, guest, *again)?;
            }
        }
        GuestCommand::Verify { name } => {
            let mut bar = Bar::default();
            cache.verify(find(name)?, &mut bar)?;
            bar.clear();
            println!("{name} is as it was prepared");
        }
        GuestCommand::Remove { name } => cache.remove(find(name)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn chosen(names: &[String]) -> anyhow::Result<Vec<&'static Guest>> {
    if names.is_empty() {
        return Ok(guests().iter().collect());
    }
    Ok(names.iter().map(|name| find(name)).collect::<Result<_, _>>()?)
}

fn list(cache: &Cache) {
    let width = guests().iter().map(|guest| guest.name.len()).max().unwrap_or(0);
    for guest in guests() {
        let state = match cache.ready(guest) {
            Some(prepared) => prepared.version,
            None => format!("not prepared, {} MiB", guest.prepared_mib),
        };
        println!("{:width$}  {} ({state})", guest.name, guest.summary);
    }
}

fn fetch(cache: &Cache, guest: &'static Guest, again: bool) -> anyhow::Result<()> {
    let mut bar = Bar::default();
    let prepared = if again { cache.fetch_again(guest, &mut bar) } else { cache.fetch(guest, &mut bar) };
    bar.clear();
    let prepared = prepared?;
    println!("{}: {}\n  {}", guest.name, prepared.version, command(guest, &prepared));
    Ok(())
}

/// The command that runs a prepared guest.
fn command(guest: &Guest, prepared: &Prepared) -> String {
    let mut text = String::new();
    // A copy: what the guest writes must not spoil what the next VM starts from.
    if let Some((disk, format)) = &prepared.disk {
        let copy = format!("{}.{}", guest.name, format.name());
        text.push_str(&format!("cp --sparse=always {} {copy}\n  ", disk.display()));
    }
    text.push_str(&format!("bedplate run --kernel {}", prepared.kernel.display()));
    if let Some(initrd) = &prepared.initrd {
        text.push_str(&format!(" --initrd {}", initrd.display()));
    }
    if let Some((_, format)) = &prepared.disk {
        text.push_str(&format!(" --disk {}.{name},format={name}", guest.name, name = format.name()));
    }
    text.push_str(&format!(" --memory {}M --append '{}'", guest.memory_mib, prepared.append));
    text
}

/// Steps as a spinner, or as a bar where the length is known.
#[derive(Default)]
struct Bar(Option<ProgressBar>);

impl Bar {
    fn clear(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bar {
    fn step(&mut self, title: &str, total: Option<u64>) {
        self.clear();
        let bar = match total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::new_spinner(),
        };
        let template = match total {
            Some(_) => "{msg} [{bar:30}] {bytes}/{total_bytes}",
            None => "{spinner} {msg}",
        };
        if bar.is_hidden() {
            eprintln!("{title}");
        }
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(title.to_string());
        bar.enable_steady_tick(Duration::from_millis(120));
        self.0 = Some(bar);
    }
    fn at(&mut self, done: u64) {
        if let Some(bar) = &self.0 {
            bar.set_position(done);
        }
    }
    fn note(&mut self, text: &str) {
        match &self.0 {
            Some(bar) if !bar.is_hidden() => bar.println(text),
            _ => eprintln!("{text}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_guests_are_refused_with_the_known_ones() {
        let error = chosen(&["minix".into()]).unwrap_err().to_string();
        assert!(error.contains("minix") && error.contains("cloud"), "{error}");
        assert_eq!(chosen(&[]).unwrap().len(), guests().len());
    }
}
