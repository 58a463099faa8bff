// The divergences, one struct each. A struct says how a key contributes while the keys stream past,
// how the row's value follows from the sums, and what the gradient with respect to a logit is.
//
// Everything is in base 2 with u = s - t the difference of raw logits; a and b are probabilities,
// and p, pt the same before normalisation. Derivations: D = ln2 * finish(...) is the definition
// with log a = ln2 (s - Ls) and log b = ln2 (t - Lt) put in and the sums pulled apart. In the
// gradient the LSEs cancel; what is left is p (grad_probability + ...) with the row's inverse sum
// folded into all that p is multiplied by.
#pragma once

#include "bias.h"

namespace attn_kd::ATTN_KD_ISA {

struct NoDivergence {
  static constexpr bool kTeacher = false;
  static constexpr bool kTeacherProbability = false;
};

// KL(student || teacher) = sum a log(a / b); dD/ds = a (log(a / b) - D) = a (u - sum a u)
struct ReverseKL {
  static constexpr bool kTeacher = true;
  static constexpr bool kTeacherProbability = false;

  template <class V>
  static V term(V p, V, V u) {
    return p * u;
  }
  template <class T>
  static T finish(T sum, T student_sum, T, T lse, T teacher_lse) {
    return sum / student_sum - lse + teacher_lse;
  }
  // The part of the gradient that u must be measured from: sum a u, in natural units.
  template <class T>
  static T correction(T sum, T student_sum) {
    return T(kLn2) * sum / student_sum;
  }
  template <class T>
  static T offset(T grad, T correction) {
    return -grad * correction;
  }
  template <class T>
  static T slope(T grad, T inverse_sum) {
    return grad * T(kLn2) * inverse_sum;
  }
  template <class V>
  static V grad_logit(V p, V, V u, V grad_probability, V slope) {
    return p * (grad_probability + slope * u);
  }
};

// KL(teacher || student) = sum b log(b / a); dD/ds = a - b
struct ForwardKL {
  static constexpr bool kTeacher = true;
  static constexpr bool kTeacherProbability = true;

  template <class V>
  static V term(V, V pt, V u) {
    return -(pt * u);
  }
  template <class T>
  static T finish(T sum, T, T teacher_sum, T lse, T teacher_lse) {
    return sum / teacher_sum + lse - teacher_lse;
  }
  template <class T>
  static T correction(T, T) {
    return 0;
  }
  template <class T>
  static T offset(T grad, T) {
    return grad;
  }
  template <class T>
  static T slope(T grad, T) {
    return grad;
  }
  template <class V>
  static V grad_logit(V p, V b, V, V grad_probability, V slope) {
    return p * grad_probability - slope * b;
  }
};

}  // namespace attn_kd::ATTN_KD_ISA
