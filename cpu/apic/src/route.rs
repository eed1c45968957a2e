//! Who a message is for. `inboxes` is all processors of the machine, by number.
//!
//! Lowest priority is arbitrated by the vector, as recent processors do: the same vector goes to the same
//! one of its destinations, which needs no look at their priorities.

use crate::inbox::ApicInbox;
use crate::message::{DeliveryMode, IpiCommand, Message, Shorthand};
use alloc::sync::Arc;

/// Numbers of the processors that `message` reaches.
pub fn destinations<'a>(
    message: &'a Message,
    inboxes: &'a [Arc<ApicInbox>],
) -> impl Iterator<Item = usize> + 'a {
    let one = message.mode == DeliveryMode::LowestPriority
        || (message.redirect && message.mode == DeliveryMode::Fixed);
    // One of several: it must be able to take it.
    let named = inboxes
        .iter()
        .enumerate()
        .filter(move |(_, i)| i.is_named_by(message) && (!one || i.software_enabled()));
    let named = named.map(|(number, _)| number);
    let (skip, take) = if one {
        let count = named.clone().count();
        (usize::from(message.vector).checked_rem(count).unwrap_or(0), 1)
    } else {
        (0, usize::MAX)
    };
    named.skip(skip).take(take)
}

/// Posts `message` (of an MSI or the I/O APIC) to those it is for; `wake` is called with the number of each
/// processor that must look.
pub fn deliver(message: &Message, inboxes: &[Arc<ApicInbox>], mut wake: impl FnMut(usize)) {
    for number in destinations(message, inboxes) {
        if inboxes[number].post(message) {
            wake(number);
        }
    }
}

/// As [`deliver`], for an inter-processor interrupt of processor `sender`.
pub fn deliver_ipi(
    command: &IpiCommand,
    sender: usize,
    inboxes: &[Arc<ApicInbox>],
    mut wake: impl FnMut(usize),
) {
    let message = &command.message;
    if command.shorthand == Shorthand::None {
        return deliver(message, inboxes, wake);
    }
    for (number, inbox) in inboxes.iter().enumerate() {
        let meant = match command.shorthand {
            Shorthand::Myself => number == sender,
            Shorthand::Others => number != sender,
            _ => true,
        };
        if meant && inbox.post(message) {
            wake(number);
        }
    }
}
