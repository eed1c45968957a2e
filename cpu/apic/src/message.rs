//! Interrupt messages: what MSIs, I/O APIC and inter-processor interrupts say (SDM vol. 3, 11.6.1, 11.11).

/// What a message does at its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, at every destination.
    Fixed,
    /// The vector, at one of the destinations.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up (SIPI): the vector names the page to start at.
    StartUp,
    /// The 8259 has the vector.
    ExtInt,
}

impl DeliveryMode {
    /// From the three bits; `None` for the reserved code.
    pub fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
    /// Whether the vector goes through the IRR.
    pub fn has_vector(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// A message to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who it is for.
    pub destination: u32,
    /// The destination is a set of logical ids, not a physical id.
    pub logical: bool,
    /// The destination has 32 bits (sent in x2APIC mode), so that "all" is 0xFFFF_FFFF and not 0xFF.
    pub wide: bool,
    /// One of the destinations is enough (redirection hint of an MSI).
    pub redirect: bool,
    /// What it does.
    pub mode: DeliveryMode,
    /// Vector.
    pub vector: u8,
    /// Level-triggered: the I/O APIC waits for the EOI.
    pub level: bool,
}

impl Message {
    /// From an MSI's address and data; `None` if it is none. Address bits 11:5 are destination bits 14:8,
    /// as guests use them that were told so by CPUID (KVM_FEATURE_MSI_EXT_DEST_ID).
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != 0xFEE {
            return None;
        }
        let address = address as u32;
        Some(Self {
            destination: (address >> 12 & 0xFF) | (address >> 5 & 0x7F) << 8,
            logical: address & 1 << 2 != 0,
            wide: false,
            redirect: address & 1 << 3 != 0,
            mode: DeliveryMode::from_bits(data >> 8)?,
            vector: data as u8,
            level: data & 1 << 15 != 0,
        })
    }
}

/// Destinations that need no id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// None: the message's destination counts.
    None,
    /// The sender.
    Myself,
    /// All.
    All,
    /// All but the sender.
    Others,
}

/// A write to the interrupt command register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpiCommand {
    /// Who it is for, if not by the message's destination.
    pub shorthand: Shorthand,
    /// The message.
    pub message: Message,
}

impl IpiCommand {
    /// From both halves of the register; `None` if it sends nothing (reserved mode, INIT de-assert).
    pub(crate) fn from_icr(low: u32, destination: u32, x2apic: bool) -> Option<Self> {
        let mode = DeliveryMode::from_bits(low >> 8)?;
        let (level, assert) = (low & 1 << 15 != 0, low & 1 << 14 != 0);
        if mode == DeliveryMode::Init && level && !assert {
            return None;
        }
        let shorthand = match low >> 18 & 3 {
            0 => Shorthand::None,
            1 => Shorthand::Myself,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        let message = Message {
            destination,
            logical: low & 1 << 11 != 0,
            wide: x2apic,
            redirect: false,
            mode,
            vector: low as u8,
            // Processors of the last twenty years send every fixed IPI as an edge.
            level: false,
        };
        Some(Self { shorthand, message })
    }
}
