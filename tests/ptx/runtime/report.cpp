// Findings: the first of each kind and line in full, the others counted.
//
// A line is written as {kernel:line}; the Python side replaces it by the source line and the instruction's text.
#include <cstdarg>
#include <cstdio>
#include <map>

#include "block.h"

namespace ptx {
namespace {

struct Finding {
  uint32_t count = 0;
  std::string text;
};
std::map<std::pair<std::string, std::string>, Finding> findings;
std::string text_of_all;

}  // namespace

std::string format_line(Line line) {
  return "{" + std::string(block.image ? block.image->name : "") + ":" + std::to_string(line) + "}";
}

void report(const char* kind, Line line, const char* format, ...) {
  Finding& finding = findings[{kind, format_line(line)}];
  if (finding.count++) return;
  char message[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  char who[160];
  if (current != nullptr) {
    snprintf(who, sizeof who, "block (%u, %u, %u), thread %u", block_index.x, block_index.y, block_index.z,
             current->number);
  } else {
    snprintf(who, sizeof who, "block (%u, %u, %u)", block_index.x, block_index.y, block_index.z);
  }
  finding.text = std::string(kind) + " at " + format_line(line) + ": " + message + " [" + who + "]";
}

bool reported(const char* kind) {
  for (const auto& [key, finding] : findings) {
    if (key.first == kind) return true;
  }
  return false;
}

const char* report_text() {
  text_of_all.clear();
  for (const auto& [key, finding] : findings) {
    text_of_all += finding.text + (finding.count > 1 ? " x" + std::to_string(finding.count) : "") + "\n";
  }
  return text_of_all.c_str();
}

void clear_report() {
  findings.clear();
}

}  // namespace ptx
