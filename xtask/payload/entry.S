/* Entered by PVH (a 32-bit protected mode, flat, without paging): maps the low 4 GiB one to one and goes on in 64-bit
 * mode. The note is the one by which QEMU and Bedplate find the entry (Xen's elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY). */
    .section .note.Xen, "a", @note
    .align 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad entry

    .text
    .code32
    .global entry
entry:
    mov $stack_end, %esp
    mov $pdpt + 3, %eax
    mov %eax, pml4
    mov $pds + 3, %eax
    mov $pdpt, %edi
    mov $4, %ecx
1:  mov %eax, (%edi)
    add $4096, %eax
    add $8, %edi
    loop 1b
    mov $0x83, %eax              /* 2 MiB, writable */
    mov $pds, %edi
    mov $2048, %ecx
2:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 2b
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0x20, %eax              /* PAE */
    mov %eax, %cr4
    mov $0xC0000080, %ecx        /* EFER.LME */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $3f
    .code64
3:  mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    call payload
    /* Over: a triple fault, which ends every VMM. */
    lidt no_idt
    int3

    .data
    .align 8
gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
gdt_pointer:
    .word 23
    .quad gdt
no_idt:
    .word 0
    .quad 0

    .bss
    .align 4096
    .global pml4, pdpt, spare_pdpt, spare_pd
pml4:
    .skip 4096
pdpt:
    .skip 4096
pds:
    .skip 4 * 4096
spare_pdpt:
    .skip 4096
spare_pd:
    .skip 4096
    .skip 16384
stack_end:
