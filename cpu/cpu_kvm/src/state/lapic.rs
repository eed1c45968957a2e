//! The local APIC's registers as KVM shows them: a page with a 32-bit register every 16 bytes (SDM vol. 3, table 11-1).

use apic::ApicState;
use kvm_bindings::kvm_lapic_state;
use x86_defs::msr::APIC_BASE_X2APIC;

// Byte offsets in the page.
const ID: usize = 0x20;
const TPR: usize = 0x80;
const LDR: usize = 0xD0;
const DFR: usize = 0xE0;
const SVR: usize = 0xF0;
const ISR: usize = 0x100;
const TMR: usize = 0x180;
const IRR: usize = 0x200;
const ESR: usize = 0x280;
const ICR: usize = 0x300;
const ICR_HIGH: usize = 0x310;
const LVT: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3E0;

/// Timer mode in its LVT entry: TSC deadline.
const LVT_TSC_DEADLINE: u32 = 2 << 17;
const LVT_TIMER_MODE: u32 = 3 << 17;

/// See the module's header.
#[derive(Clone)]
pub struct ApicPage(pub kvm_lapic_state);

impl ApicPage {
    fn get(&self, at: usize) -> u32 {
        let byte = |i: usize| self.0.regs[at + i] as u8;
        u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
    }

    fn put(&mut self, at: usize, value: u32) {
        for (to, byte) in self.0.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
            *to = byte as _;
        }
    }

    fn get_bits(&self, at: usize) -> [u32; 8] {
        core::array::from_fn(|i| self.get(at + 16 * i))
    }

    fn put_bits(&mut self, at: usize, bits: &[u32; 8]) {
        for (i, word) in bits.iter().enumerate() {
            self.put(at + 16 * i, *word);
        }
    }

    /// Whether its timer counts down (it has no TSC deadline).
    pub fn counts(&self) -> bool {
        self.get(LVT) & LVT_TIMER_MODE != LVT_TSC_DEADLINE
    }

    /// Ticks of the timer's input for one of its count: the divide configuration.
    fn divisor(&self) -> u64 {
        let code = self.get(DIVIDE);
        1 << (((code & 3 | code >> 1 & 4) + 1) & 7)
    }

    /// Nanoseconds until a count that runs is over: the input ticks once a nanosecond.
    pub fn ns_left(&self) -> Option<u64> {
        let left = u64::from(self.get(CURRENT_COUNT));
        (self.counts() && left != 0).then(|| left * self.divisor())
    }

    /// Makes the timer count `ns` more when the page is set; `None`: it does not run.
    pub fn set_ns_left(&mut self, ns: Option<u64>) {
        // Rounded up, because zero means stopped. A moment that has passed is one tick ahead.
        let count = ns.map_or(0, |ns| ns.div_ceil(self.divisor()).clamp(1, u32::MAX.into()) as u32);
        self.put(CURRENT_COUNT, count);
    }

    /// In neutral form, without times. `base` is APIC_BASE.
    pub fn state(&self, id: u32, base: u64) -> ApicState {
        let x2apic = base & APIC_BASE_X2APIC != 0;
        // x2APIC derives LDR from the id and has no DFR.
        let (ldr, dfr) = if x2apic { (0, u32::MAX) } else { (self.get(LDR), self.get(DFR)) };
        ApicState {
            id,
            base,
            tpr: self.get(TPR) as u8,
            ldr,
            dfr,
            svr: self.get(SVR),
            isr: self.get_bits(ISR),
            tmr: self.get_bits(TMR),
            irr: self.get_bits(IRR),
            esr: self.get(ESR),
            errors: 0,
            icr: u64::from(self.get(ICR_HIGH)) << 32 | u64::from(self.get(ICR)),
            lvt: core::array::from_fn(|i| self.get(LVT + 16 * i)),
            initial_count: self.get(INITIAL_COUNT),
            divide: self.get(DIVIDE),
            expires: None,
            tsc_deadline: 0,
            extint: false,
            events: 0,
            sipi_vector: 0,
        }
    }

    /// Over the registers in the page, the timer stopped. Errors not yet shown are shown.
    pub fn set_state(&mut self, s: &ApicState) {
        let x2apic = s.base & APIC_BASE_X2APIC != 0;
        self.put(ID, if x2apic { s.id } else { s.id << 24 });
        self.put(TPR, s.tpr.into());
        if !x2apic {
            self.put(LDR, s.ldr);
            self.put(DFR, s.dfr);
        }
        self.put(SVR, s.svr);
        self.put_bits(ISR, &s.isr);
        self.put_bits(TMR, &s.tmr);
        self.put_bits(IRR, &s.irr);
        self.put(ESR, s.esr | s.errors);
        self.put(ICR, s.icr as u32);
        self.put(ICR_HIGH, (s.icr >> 32) as u32);
        for (i, entry) in s.lvt.iter().enumerate() {
            self.put(LVT + 16 * i, *entry);
        }
        self.put(INITIAL_COUNT, s.initial_count);
        self.put(DIVIDE, s.divide);
        self.put(CURRENT_COUNT, 0);
    }

    /// An interrupt that was acknowledged and not delivered waits again.
    pub fn unacknowledge(state: &mut ApicState, vector: u8) -> bool {
        let (word, bit) = (usize::from(vector / 32), 1 << (vector % 32));
        let in_service = state.isr[word] & bit != 0;
        if in_service {
            state.isr[word] &= !bit;
            state.irr[word] |= bit;
        }
        in_service
    }
}
