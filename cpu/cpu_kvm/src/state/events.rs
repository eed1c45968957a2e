//! Events: interrupt shadow, NMI, exceptions and interrupts under way (api.rst, KVM_GET_VCPU_EVENTS).

use hypervisor::VcpuState;
use hypervisor::state::{InterruptShadow, PendingEvent};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, kvm_vcpu_events,
};
use x86_defs::Exception;

/// Into `state`; registers were read before.
pub fn read(state: &mut VcpuState, events: &kvm_vcpu_events) {
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

/// The other way. CR2 and DR6 of the exception are in their registers already.
pub fn to_kvm(state: &VcpuState) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING,
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
