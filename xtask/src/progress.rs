//! Shows the steps of preparing guests: a progress bar on a terminal, a line per step elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use guest_catalog::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// For one or more preparations.
#[derive(Debug)]
pub struct Bars {
    bar: Option<ProgressBar>,
    terminal: bool,
}

impl Bars {
    pub fn new() -> Self {
        Self { bar: None, terminal: std::io::stderr().is_terminal() }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bars {
    fn step(&mut self, title: &str, total: Option<u64>) {
        self.finish();
        if !self.terminal {
            eprintln!("  {title}");
            return;
        }
        let (bar, template) = match total {
            Some(bytes) => (ProgressBar::new(bytes), "  {msg} {wide_bar} {bytes}/{total_bytes}"),
            None => (ProgressBar::new_spinner(), "  {spinner} {msg} ({elapsed})"),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(title.to_string());
        bar.enable_steady_tick(Duration::from_millis(200));
        self.bar = Some(bar);
    }

    fn at(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    fn note(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(format!("  note: {text}")),
            None => eprintln!("  note: {text}"),
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.finish();
    }
}
