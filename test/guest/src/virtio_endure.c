/* Work that goes on whatever happens to its device: when it needs a reset, its driver starts anew. */
#include "virtio.h"

#define STARTS_MAX 1000
#define AGAIN_MS 20

static const char *wrong;

/* The answer of the device has come, and it is not what was asked for. A reset is no excuse for that. */
const char *endure_wrong(const char *why) {
  if (!wrong) wrong = why;
  return why;
}

const char *virtio_endure(const char *name, const struct endurance *subject, u32 requests) {
  u32 starts = 0, beside = 0, attempt = 0;
  bool has_other = other_start(subject->device->id);
  u64 mark = heap_mark();
  const char *error = "not started", *reason = NULL;
  wrong = NULL;
  for (u32 done = 0; done < requests && !reason;) {
    if (error) {
      /* While it is broken, the others are not. */
      if (starts && has_other) {
        reason = other_work();
        beside++;
      }
      if (starts++ == STARTS_MAX) reason = "too many resets";
      if (reason) break;
      heap_back(mark);
      error = subject->start();
      if (error) wait_for(&interrupt_count[VECTOR_SPURIOUS], ~0u, AGAIN_MS); /* it failed again meanwhile */
      continue;
    }
    error = subject->request(done, attempt++);
    if (wrong)
      reason = wrong;
    else if (!error)
      done++;
    else if (!virtio_needs_reset(subject->device))
      reason = error;
  }
  if (has_other) other_stop();
  if (!reason) say("%s endure %u requests %u resets %u beside ok", name, U(requests), U(starts - 1), U(beside));
  return reason;
}

u32 endure_requests(const char *text) {
  if (*text++ != ',') return 100;
  return (u32)take_number(&text);
}

/* ---- what requests carry ---------------------------------------------------------------------------------------- */

static u32 sum_of(const struct note *note) {
  u32 sum = note->done * 31 + note->attempt;
  for (u32 i = 0; i < sizeof note->rest; i++) sum = (sum << 1 | sum >> 31) + note->rest[i];
  return sum;
}

void note_write(struct note *note, u32 done, u32 attempt) {
  note->magic = NOTE_MAGIC;
  note->done = done;
  note->attempt = attempt;
  for (u32 i = 0; i < sizeof note->rest; i++) note->rest[i] = (u8)(attempt * 7 + i * 13);
  note->sum = sum_of(note);
}

bool note_good(const struct note *note) { return note->magic == NOTE_MAGIC && note->sum == sum_of(note); }
