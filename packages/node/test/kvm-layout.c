/*
 * Prints what the system's linux/kvm.h says about the names in table.h, which the test writes from the TypeScript tables.
 * A name that this header does not define is printed as missing.
 */
#include <stddef.h>
#include <stdio.h>
#include <linux/kvm.h>

#define STRUCT(tag) printf("struct %s %zu\n", #tag, sizeof(struct tag));
#define FIELD(tag, member) \
	printf("field %s.%s %zu %zu\n", #tag, #member, offsetof(struct tag, member), sizeof(((struct tag *)0)->member));
/* A flexible array has an offset and no size. */
#define FLEXIBLE(tag, member) printf("field %s.%s %zu 0\n", #tag, #member, offsetof(struct tag, member));
#define CONSTANT(name) printf("constant %s %llu\n", #name, (unsigned long long)(name));
#define MISSING(name) printf("missing %s\n", #name);

int main(void)
{
#include "table.h"
	return 0;
}
