//! Registers as the guest reaches them: MMIO in xAPIC mode, MSRs in x2APIC mode (SDM vol. 3, 11.4, 11.12).

use crate::local::{ApicAction, LocalApic, NoSuchRegister, Registers};
use crate::message::{DeliveryMode, IpiCommand, Shorthand};
use crate::registers::{self as reg, FIRST_VECTOR, TimerMode, lvt};
use x86_defs::msr;

impl LocalApic {
    /// A read within the register page. Each register is 4 bytes at a multiple of 16; bytes within one may be
    /// read singly, everything else is zero.
    pub fn mmio_read(&mut self, offset: u32) -> u32 {
        if self.mmio_base().is_none() || offset & 0xF >= 4 {
            return 0;
        }
        let number = offset >> 4 & 0xFF;
        match self.read(number) {
            Some(value) => value >> (8 * (offset & 3)),
            None => {
                self.error(reg::ESR_REGISTER);
                0
            }
        }
    }

    /// A write of 4 bytes within the register page.
    pub fn mmio_write(&mut self, offset: u32, value: u32) -> ApicAction {
        if self.mmio_base().is_none() || offset & 0xF != 0 {
            return ApicAction::None;
        }
        self.advance(self.clock.now());
        let number = offset >> 4 & 0xFF;
        match number {
            reg::LDR => self.regs.ldr = value & 0xFF00_0000,
            reg::DFR => self.regs.dfr = value | reg::DFR_ONES,
            reg::ICR_HIGH => {
                self.regs.icr = (self.regs.icr & 0xFFFF_FFFF) | u64::from(value & 0xFF00_0000) << 32
            }
            reg::ICR => {
                return self.command(self.regs.icr >> 32 << 32 | u64::from(value & reg::ICR_WRITABLE));
            }
            _ => match self.write(number, value) {
                Some(action) => return action,
                None => self.error(reg::ESR_REGISTER),
            },
        }
        self.publish();
        ApicAction::None
    }

    /// RDMSR of APIC_BASE, TSC_DEADLINE or an x2APIC register.
    pub fn msr_read(&mut self, msr: u32) -> Result<u64, NoSuchRegister> {
        match msr {
            msr::APIC_BASE => Ok(self.base),
            msr::TSC_DEADLINE if self.features.tsc_deadline => {
                self.advance(self.clock.now());
                Ok(self.regs.timer.tsc_deadline)
            }
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.x2apic() => match msr - msr::X2APIC_FIRST {
                reg::ICR => Ok(self.regs.icr),
                reg::ICR_HIGH | reg::DFR | reg::ARBITRATION | reg::REMOTE_READ | reg::EOI => {
                    Err(NoSuchRegister)
                }
                number => self.read(number).map(u64::from).ok_or(NoSuchRegister),
            },
            _ => Err(NoSuchRegister),
        }
    }

    /// WRMSR of APIC_BASE, TSC_DEADLINE or an x2APIC register.
    pub fn msr_write(&mut self, msr: u32, value: u64) -> Result<ApicAction, NoSuchRegister> {
        self.advance(self.clock.now());
        match msr {
            msr::APIC_BASE => self.set_base(value),
            msr::TSC_DEADLINE if self.features.tsc_deadline => {
                if self.timer_mode() == TimerMode::TscDeadline {
                    let now = self.clock.now();
                    self.regs.timer.set_tsc_deadline(&self.clock, now, value);
                    self.advance(now);
                }
                Ok(ApicAction::None)
            }
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.x2apic() => {
                self.x2apic_write(msr - msr::X2APIC_FIRST, value)
            }
            _ => Err(NoSuchRegister),
        }
    }

    fn x2apic_write(&mut self, number: u32, value: u64) -> Result<ApicAction, NoSuchRegister> {
        if number == reg::ICR {
            if value as u32 & !(reg::ICR_WRITABLE | reg::ICR_BUSY) != 0 {
                return Err(NoSuchRegister);
            }
            return Ok(self.command(value & !u64::from(reg::ICR_BUSY)));
        }
        let allowed = match number {
            reg::TPR => 0xFF,
            reg::EOI | reg::ESR => 0,
            reg::SVR => reg::SVR_WRITABLE,
            reg::LVT_TIMER..=reg::LVT_ERROR => self.lvt_writable(number) | lvt::READ_ONLY,
            reg::INITIAL_COUNT => u32::MAX,
            reg::DIVIDE => reg::DIVIDE_WRITABLE,
            reg::SELF_IPI => 0xFF,
            _ => return Err(NoSuchRegister),
        };
        if value & !u64::from(allowed) != 0 {
            return Err(NoSuchRegister);
        }
        if number == reg::SELF_IPI {
            // 0b01 in bits 19:18: to itself.
            return Ok(self.command(self.regs.icr >> 32 << 32 | 1 << 18 | value));
        }
        self.write(number, value as u32).ok_or(NoSuchRegister)
    }

    fn lvt_writable(&self, number: u32) -> u32 {
        let tsc_deadline_bit = if self.features.tsc_deadline { 0 } else { 1 << 18 };
        match (number - reg::LVT_TIMER) as usize {
            lvt::TIMER => lvt::WRITABLE[lvt::TIMER] & !tsc_deadline_bit,
            entry => lvt::WRITABLE.get(entry).copied().unwrap_or(0),
        }
    }

    /// Registers that both modes have.
    fn read(&mut self, number: u32) -> Option<u32> {
        let now = self.clock.now();
        self.advance(now);
        self.pending_vector();
        let r = &self.regs;
        Some(match number {
            reg::ID if self.x2apic() => self.id,
            reg::ID => self.id << 24,
            reg::VERSION => reg::VERSION_VALUE,
            reg::TPR => u32::from(r.tpr),
            reg::ARBITRATION | reg::PPR => u32::from(self.ppr()),
            reg::EOI | reg::REMOTE_READ => 0,
            reg::LDR => self.logical_id(),
            reg::DFR => r.dfr,
            reg::SVR => r.svr,
            reg::ISR..reg::TMR => r.isr[(number - reg::ISR) as usize],
            reg::TMR..reg::IRR => r.tmr[(number - reg::TMR) as usize],
            reg::IRR..=reg::IRR_LAST => r.irr[(number - reg::IRR) as usize],
            reg::ESR => r.esr,
            reg::ICR => r.icr as u32,
            reg::ICR_HIGH => (r.icr >> 32) as u32,
            reg::LVT_TIMER..=reg::LVT_ERROR => r.lvt[(number - reg::LVT_TIMER) as usize],
            reg::INITIAL_COUNT => r.timer.initial_count,
            reg::CURRENT_COUNT if self.timer_mode() == TimerMode::TscDeadline => 0,
            reg::CURRENT_COUNT => r.timer.current_count(now),
            reg::DIVIDE => r.timer.divide,
            _ => return None,
        })
    }

    /// Registers that both modes have, but for the ICR.
    fn write(&mut self, number: u32, value: u32) -> Option<ApicAction> {
        let now = self.clock.now();
        let counts = self.timer_mode() != TimerMode::TscDeadline;
        match number {
            reg::TPR => self.regs.tpr = value as u8,
            reg::EOI => return Some(self.end_of_interrupt()),
            reg::SVR => self.set_svr(value & reg::SVR_WRITABLE),
            reg::ESR => self.regs.esr = core::mem::take(&mut self.regs.errors),
            reg::LVT_TIMER..=reg::LVT_ERROR => self.set_lvt(number, value),
            reg::INITIAL_COUNT if counts => self.regs.timer.set_initial_count(now, value),
            reg::DIVIDE if counts => self.regs.timer.set_divide(now, value & reg::DIVIDE_WRITABLE),
            reg::DIVIDE => self.regs.timer.divide = value & reg::DIVIDE_WRITABLE,
            // Read-only, or without effect in this mode.
            reg::INITIAL_COUNT | reg::ID | reg::VERSION | reg::ARBITRATION | reg::PPR | reg::REMOTE_READ => {}
            reg::ISR..=reg::IRR_LAST | reg::CURRENT_COUNT => {}
            _ => return None,
        }
        Some(ApicAction::None)
    }

    fn set_svr(&mut self, value: u32) {
        self.regs.svr = value;
        if !self.software_enabled() {
            self.regs.lvt.iter_mut().for_each(|entry| *entry |= lvt::MASKED);
        }
        self.publish();
    }

    fn set_lvt(&mut self, number: u32, value: u32) {
        let mut value = value & self.lvt_writable(number);
        if !self.software_enabled() {
            value |= lvt::MASKED;
        }
        let entry = (number - reg::LVT_TIMER) as usize;
        let deadline = |value| TimerMode::of(value) == TimerMode::TscDeadline;
        if entry == lvt::TIMER && deadline(value) != deadline(self.regs.lvt[entry]) {
            self.regs.timer.disarm();
        }
        self.regs.lvt[entry] = value;
    }

    /// The interrupt command register was written.
    fn command(&mut self, icr: u64) -> ApicAction {
        self.regs.icr = icr;
        let x2apic = self.x2apic();
        let destination = (icr >> if x2apic { 32 } else { 56 }) as u32;
        let Some(command) = IpiCommand::from_icr(icr as u32, destination, x2apic) else {
            return ApicAction::None;
        };
        let (mode, vector) = (command.message.mode, command.message.vector);
        if mode.has_vector() && vector < FIRST_VECTOR {
            self.error(reg::ESR_SEND_VECTOR);
            return ApicAction::None;
        }
        if command.shorthand == Shorthand::Myself {
            // Only fixed interrupts may go to oneself this way.
            if mode == DeliveryMode::Fixed && self.software_enabled() {
                self.accept(vector);
            }
            return ApicAction::None;
        }
        ApicAction::Ipi(command)
    }

    /// APIC_BASE: the modes change as SDM vol. 3, figure 11-27 allows.
    fn set_base(&mut self, value: u64) -> Result<ApicAction, NoSuchRegister> {
        let x2apic_bit = if self.features.x2apic { msr::APIC_BASE_X2APIC } else { 0 };
        let address = ((1u64 << self.features.physical_bits.clamp(32, 52)) - 1) & !0xFFF;
        let allowed = address | msr::APIC_BASE_ENABLE | msr::APIC_BASE_BSP | x2apic_bit;
        let (was_on, was_x2) = (self.enabled(), self.x2apic());
        let on = value & msr::APIC_BASE_ENABLE != 0;
        let x2 = value & msr::APIC_BASE_X2APIC != 0;
        let step_allowed = match (on, x2) {
            (false, x2) => !x2,
            (true, true) => was_on,
            (true, false) => !was_x2,
        };
        if value & !allowed != 0 || !step_allowed {
            return Err(NoSuchRegister);
        }
        self.base = value;
        if was_on && !on {
            self.regs = Registers::reset(self.is_bsp);
        }
        if x2 && !was_x2 {
            // The destination has all 32 bits from now on.
            self.regs.icr &= 0xFFFF_FFFF;
        }
        self.publish();
        Ok(ApicAction::BaseChanged { mmio: self.mmio_base(), enabled: on })
    }
}
