//! Events: interrupt shadow, NMI, exceptions and interrupts under way (api.rst, KVM_GET_VCPU_EVENTS).

use hypervisor::VcpuState;
use hypervisor::state::{InterruptShadow, PendingEvent, RunState};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_vcpu_events,
};
use std::io;
use x86_defs::Exception;

/// Into `state`; registers and run state were read before. An error where a state cannot hold it.
pub fn read(state: &mut VcpuState, events: &kvm_vcpu_events) -> io::Result<()> {
    let smi = &events.smi;
    if events.flags & KVM_VCPUEVENT_VALID_SMM != 0 && (smi.smm | smi.pending) != 0 {
        return Err(io::Error::other("the processor is in system-management mode"));
    }
    if events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0 && events.triple_fault.pending != 0 {
        state.run_state = RunState::Shutdown;
    }
    let shadow = u32::from(events.interrupt.shadow);
    state.shadow = if shadow & KVM_X86_SHADOW_INT_MOV_SS != 0 {
        InterruptShadow::MovSs
    } else if shadow & KVM_X86_SHADOW_INT_STI != 0 {
        InterruptShadow::Sti
    } else {
        InterruptShadow::None
    };
    // One that was taken and not delivered is as good as one that waits.
    state.nmi_pending = events.nmi.pending != 0 || events.nmi.injected != 0;
    state.nmi_blocked = events.nmi.masked != 0 && events.nmi.injected == 0;
    state.exception = exception(state, events);
    // INT n is executed anew: RIP is still at it.
    let external = events.interrupt.injected != 0 && events.interrupt.soft == 0;
    state.interrupt = external.then_some(events.interrupt.nr);
    Ok(())
}

fn exception(state: &VcpuState, events: &kvm_vcpu_events) -> Option<PendingEvent> {
    let e = &events.exception;
    if e.injected == 0 && e.pending == 0 {
        return None;
    }
    let exception = Exception::from_vector(e.nr)?;
    let address = match exception {
        // INT3 and INTO are executed anew.
        Exception::Breakpoint | Exception::Overflow => return None,
        Exception::PageFault => state.cr2,
        _ => 0,
    };
    // KVM has put the cause of a #DB into DR6 already, and RIP is where its frame will point.
    let is_trap = exception == Exception::Debug;
    let error_code = (e.has_error_code != 0).then_some(e.error_code);
    Some(PendingEvent { exception, error_code, address, is_trap })
}

/// The other way, to a vCPU whose events have the parts `here`. CR2 and DR6 of the exception are in their registers
/// already; a shutdown is kept beside KVM.
pub fn to_kvm(state: &VcpuState, here: u32) -> kvm_vcpu_events {
    // What waits there and the state does not have is gone.
    let cleared = here & (KVM_VCPUEVENT_VALID_SMM | KVM_VCPUEVENT_VALID_TRIPLE_FAULT);
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING | cleared,
        ..kvm_vcpu_events::default()
    };
    events.interrupt.shadow = match state.shadow {
        InterruptShadow::None => 0,
        InterruptShadow::Sti => KVM_X86_SHADOW_INT_STI as u8,
        InterruptShadow::MovSs => KVM_X86_SHADOW_INT_MOV_SS as u8,
    };
    events.nmi.pending = state.nmi_pending.into();
    events.nmi.masked = state.nmi_blocked.into();
    if let Some(event) = &state.exception {
        events.exception.injected = 1;
        events.exception.nr = event.exception.vector();
        events.exception.has_error_code = event.error_code.is_some().into();
        events.exception.error_code = event.error_code.unwrap_or(0);
    }
    if let Some(vector) = state.interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_triple_fault_that_waits_is_a_shutdown() {
        let mut events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_TRIPLE_FAULT, ..Default::default() };
        let mut state = VcpuState::default();
        read(&mut state, &events).unwrap();
        assert_eq!(state.run_state, RunState::Running);
        events.triple_fault.pending = 1;
        read(&mut state, &events).unwrap();
        assert_eq!(state.run_state, RunState::Shutdown);
        let back = to_kvm(&state, events.flags);
        assert_eq!(
            (back.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT, back.triple_fault.pending),
            (events.flags, 0)
        );
        assert_eq!(to_kvm(&state, 0).flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT, 0, "KVM would refuse it");
    }

    #[test]
    fn what_no_state_holds_is_refused() {
        for set in [|e: &mut kvm_vcpu_events| e.smi.smm = 1, |e: &mut kvm_vcpu_events| e.smi.pending = 1] {
            let mut events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SMM, ..Default::default() };
            set(&mut events);
            let error = read(&mut VcpuState::default(), &events).unwrap_err();
            assert!(error.to_string().contains("system-management"), "{error}");
        }
    }
}
